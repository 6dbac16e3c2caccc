"""Initramfs archives (cpio, format newc). The kernel unpacks several of them one after the other from one initrd."""

from __future__ import annotations

import stat
from pathlib import Path


def archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """An archive of ``{name: (mode with file type, content)}``, parents before children."""
    out = bytearray()
    for number, (name, (mode, content)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def folder(mode: int = 0o755) -> tuple[int, bytes]:
    """The entry of a directory."""
    return stat.S_IFDIR | mode, b""


def script(text: str) -> tuple[int, bytes]:
    """The entry of an executable file."""
    return stat.S_IFREG | 0o755, text.encode()


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    """Entries for everything below ``root`` (folders and regular files)."""
    found: dict[str, tuple[int, bytes]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(root))
        found[name] = folder() if path.is_dir() else (status.st_mode, path.read_bytes())
    return found

"""Reading trace files: plain, xz, zstd or gzip, in chunks of whole lines, and errors that name file and rule.

The kind of archive is told by its first bytes, not by its name. A chunk ends at a line's end (the last one may not),
so that whoever scans it never sees half a line; memory stays bounded however long the trace is.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from dmakit.errors import InputError

CHUNK = 2 << 20  # what is scanned at a time should stay in a cache
_MAGIC = {b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip"}
_BROKEN = (lzma.LZMAError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, EOFError)


def archive_kind(head: bytes) -> str:
    """``xz``, ``zstd``, ``gzip`` or ``plain``, from a file's first bytes."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "plain")


def _opened(raw: BinaryIO, kind: str) -> BinaryIO:
    if kind == "xz":
        return cast(BinaryIO, lzma.open(raw))
    if kind == "gzip":
        return cast(BinaryIO, gzip.open(raw))
    return raw


def _zstd_blocks(raw: BinaryIO, size: int) -> Iterator[bytes]:
    """Blocks of a zstd file; unlike zstandard's reader it notices a frame that stops in the middle."""
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    ended, inside = True, False
    while piece := raw.read(min(size, 1 << 16)):  # text packs 1:20 and more
        while piece:
            if ended:
                decompressor = zstandard.ZstdDecompressor().decompressobj()
            yield decompressor.decompress(piece)
            piece, ended, inside = decompressor.unused_data, decompressor.eof, not decompressor.eof
    if inside:
        raise EOFError("the last zstd frame is not complete")


def _blocks(raw: BinaryIO, kind: str, size: int) -> Iterator[bytes]:
    if kind == "zstd":
        yield from _zstd_blocks(raw, size)
        return
    with _opened(raw, kind) as stream:
        while block := stream.read(size):
            yield block


def _check(path: str | Path, head: bytes) -> None:
    if not head:
        raise InputError(f"{path}: the file is empty")
    if archive_kind(head) == "plain" and b"\x00" in head[:4096]:
        raise InputError(
            f"{path}: neither text nor an xz, zstd or gzip archive (trace.dat: run trace-cmd report first)"
        )


class _Resumed(io.RawIOBase):
    """What is left of a stream, behind its first bytes that were already read."""

    def __init__(self, head: bytes, raw: BinaryIO) -> None:
        self.head, self.raw = head, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the head while there is some."""
        piece = self.head[: len(buffer)] or self.raw.read(len(buffer))
        self.head = self.head[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)


def is_read_once(path: str | Path) -> bool:
    """Whether ``path`` is standard input (``-``), a pipe or a device: what it gives cannot be asked for again."""
    return str(path) == "-" or (Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir())


def _raw(path: str | Path) -> BinaryIO:
    return open(0, "rb", closefd=False) if str(path) == "-" else open(path, "rb")


def line_chunks(path: str | Path, *, size: int = CHUNK) -> Iterator[bytes]:
    """Chunks of about ``size`` bytes of the decompressed file, each ending at a line's end (the last may not).

    ``-`` is standard input. Raises InputError for a file that cannot be read, is empty, or is a broken or truncated
    archive.
    """
    try:
        with _raw(path) as raw:
            head = raw.read(4096)
            _check(path, head)
            if is_read_once(path):
                rest = cast(BinaryIO, io.BufferedReader(_Resumed(head, raw), size))
                yield from _whole_lines(_blocks(rest, archive_kind(head), size), path)
                return
            raw.seek(0)
            yield from _whole_lines(_blocks(raw, archive_kind(head), size), path)
    except _BROKEN as error:  # before OSError: BadGzipFile is one
        raise InputError(f"{path}: the archive is truncated or broken: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}", error.errno or 22) from error


def _whole_lines(blocks: Iterator[bytes], path: str | Path) -> Iterator[bytes]:
    rest: list[bytes] = []
    some = False
    for block in blocks:
        some = some or bool(block)
        cut = block.rfind(b"\n") + 1
        if cut == 0:
            rest.append(block)
            continue
        yield b"".join((*rest, block[:cut]))
        rest = [block[cut:]] if cut < len(block) else []
    if not some:
        raise InputError(f"{path}: the archive holds an empty file")
    if rest and any(rest):
        yield b"".join(rest)


def read_all(path: str | Path) -> bytes:
    """The whole decompressed file (for small ones)."""
    return b"".join(line_chunks(path))


def first_bytes(path: str | Path, count: int = 4096) -> bytes:
    """The first decompressed bytes, to tell what kind of file it is."""
    buffer = io.BytesIO()
    for chunk in line_chunks(path, size=1 << 16):
        buffer.write(chunk)
        if buffer.tell() >= count:
            break
    return buffer.getvalue()[:count]

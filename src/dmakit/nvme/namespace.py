"""A namespace of the controller model: logical blocks on backing memory or a backing file.

Bytes that were never written, deallocated or zeroed read as zero. Metadata, when the format has it, is kept beside
the data, a fixed number of bytes a block (a separate buffer on the wire). ``bad_blocks`` lists blocks whose medium
fails, for tests of error paths.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Protocol

from dmakit.errors import HostError, MisuseError


class Backing(Protocol):
    """Where the bytes are."""

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``."""

    def write(self, offset: int, payload: bytes) -> None:
        """Store ``payload`` at ``offset``."""

    def zero(self, offset: int, size: int) -> None:
        """Make ``size`` bytes read as zero."""

    def flush(self) -> None:
        """Make everything durable."""

    def close(self) -> None:
        """Let go of host resources."""


class MemoryBacking:
    """Anonymous memory, committed as it is touched."""

    def __init__(self, size: int) -> None:
        # Private, because MADV_DONTNEED forgets the contents of private memory only.
        self.bytes = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``."""
        return self.bytes[offset : offset + size]

    def write(self, offset: int, payload: bytes) -> None:
        """Store ``payload`` at ``offset``."""
        self.bytes[offset : offset + len(payload)] = payload

    def zero(self, offset: int, size: int) -> None:
        """Make ``size`` bytes read as zero; whole pages are given back to the host."""
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if first >= last:
            self.bytes[offset : offset + size] = bytes(size)
            return
        self.bytes[offset:first] = bytes(first - offset)
        self.bytes.madvise(mmap.MADV_DONTNEED, first, last - first)
        self.bytes[last : offset + size] = bytes(offset + size - last)

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Release the memory."""
        self.bytes.close()


class FileBacking:
    """A file of the host, created or extended (sparse) to ``size`` bytes."""

    def __init__(self, path: Path | str, size: int) -> None:
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if os.fstat(self.fd).st_size < size:
                os.ftruncate(self.fd, size)
        except OSError as error:
            raise HostError(f"backing file {path}: {error.strerror}", error.errno or 5) from error

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``."""
        return os.pread(self.fd, size, offset)

    def write(self, offset: int, payload: bytes) -> None:
        """Store ``payload`` at ``offset``."""
        done = 0
        while done < len(payload):
            done += os.pwrite(self.fd, payload[done:], offset + done)

    def zero(self, offset: int, size: int) -> None:
        """Make ``size`` bytes read as zero."""
        chunk = bytes(min(size, 1 << 20))
        for at in range(0, size, 1 << 20):
            self.write(offset + at, chunk[: min(1 << 20, size - at)])

    def flush(self) -> None:
        """fdatasync."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class Namespace:
    """``blocks`` logical blocks of ``block_size`` bytes (a power of two from 512), each with ``metadata_size`` more."""

    def __init__(
        self,
        nsid: int,
        blocks: int,
        *,
        block_size: int = 512,
        metadata_size: int = 0,
        backing: Backing | None = None,
    ) -> None:
        if not 1 <= nsid < 0xFFFF_FFFE:
            raise MisuseError(f"nsid={nsid}: must lie in [1, 0xfffffffe)")
        if block_size < 512 or block_size & (block_size - 1) or block_size > 1 << 16:
            raise MisuseError(f"block_size={block_size}: must be a power of two from 512 to 65536")
        if blocks < 1 or not 0 <= metadata_size < 1 << 16:
            raise MisuseError(
                f"blocks={blocks}, metadata_size={metadata_size}: at least one block, metadata of 16 bits"
            )
        self.nsid = nsid
        self.blocks = blocks
        self.block_size = block_size
        self.metadata_size = metadata_size
        self.backing: Backing = backing if backing is not None else MemoryBacking(blocks * block_size)
        self.metadata = MemoryBacking(blocks * metadata_size) if metadata_size else None
        self.bad_blocks: set[int] = set()

    @property
    def block_shift(self) -> int:
        """log2 of the block size."""
        return self.block_size.bit_length() - 1

    def holds(self, lba: int, count: int) -> bool:
        """Whether all of ``count`` blocks from ``lba`` exist."""
        return lba + count <= self.blocks

    def damaged(self, lba: int, count: int) -> bool:
        """Whether the medium fails in this range."""
        return any(lba <= bad < lba + count for bad in self.bad_blocks)

    def read(self, lba: int, count: int) -> bytes:
        """The data of ``count`` blocks."""
        return self.backing.read(lba * self.block_size, count * self.block_size)

    def write(self, lba: int, payload: bytes) -> None:
        """Store whole blocks."""
        self.backing.write(lba * self.block_size, payload)

    def zero(self, lba: int, count: int) -> None:
        """Make blocks (and their metadata) read as zero."""
        self.backing.zero(lba * self.block_size, count * self.block_size)
        if self.metadata is not None:
            self.metadata.zero(lba * self.metadata_size, count * self.metadata_size)

    def read_metadata(self, lba: int, count: int) -> bytes:
        """The metadata of ``count`` blocks (empty without metadata)."""
        return self.metadata.read(lba * self.metadata_size, count * self.metadata_size) if self.metadata else b""

    def write_metadata(self, lba: int, payload: bytes) -> None:
        """Store metadata from block ``lba`` on."""
        if self.metadata is not None:
            self.metadata.write(lba * self.metadata_size, payload)

    def close(self) -> None:
        """Let go of the backing."""
        self.backing.close()
        if self.metadata is not None:
            self.metadata.close()

"""A write-back CPU cache in front of memory, for machines whose devices are not coherent.

On such a machine a store by the CPU stays in its cache until the line is *cleaned* (written back), and a load may
return a line that was fetched before a device changed memory, until the line is *invalidated*. That is all the
model has: whole lines of ``line`` bytes, present or not, dirty or not; nothing is evicted on its own, which is the
worst case for a driver that forgets its cache maintenance, and the same every time.

``clean`` and ``invalidate`` act on whole lines, as hardware does. A line that an invalidation covers only in part
is cleaned first if it is dirty: the bytes beside the range belong to somebody else (Linux does the same for the
ends of a buffer, ``arch/arm64/mm/cache.S``). A non-coherent device bypasses this object; the port of a coherent
one calls ``snoop`` before it touches memory.
"""

from __future__ import annotations

from dmakit.errors import MisuseError
from dmakit.memory.physical import PhysicalMemory


class CpuCache:
    """The CPU's view of ``memory``; ``line`` is a power of two from 16 to 4096 (bytes)."""

    def __init__(self, memory: PhysicalMemory, line: int = 64) -> None:
        if not 16 <= line <= 4096 or line & (line - 1):
            raise MisuseError(f"line={line}: must be a power of two from 16 to 4096")
        self.memory = memory
        self.line = line
        self._lines: dict[int, bytearray] = {}
        self._dirty: set[int] = set()

    def read(self, phys: int, size: int) -> bytes:
        """``size`` bytes as the CPU sees them: from cached lines, fetching the missing ones."""
        self.memory.region_at(phys, size)
        out = bytearray()
        for base in self._bases(phys, size):
            low, high = max(phys, base), min(phys + size, base + self.line)
            out += self._fetch(base)[low - base : high - base]
        return bytes(out)

    def write(self, phys: int, payload: bytes | bytearray | memoryview) -> None:
        """Store by the CPU: into the cache only, the lines become dirty."""
        source = memoryview(payload).cast("B")
        self.memory.region_at(phys, len(source))
        for base in self._bases(phys, len(source)):
            low, high = max(phys, base), min(phys + len(source), base + self.line)
            self._fetch(base)[low - base : high - base] = source[low - phys : high - phys]
            self._dirty.add(base)

    def clean(self, phys: int, size: int) -> int:
        """Write dirty lines of the range back to memory, keeping them cached; returns the bytes written back."""
        self.memory.region_at(phys, size)
        return sum(self._write_back(base) for base in self._bases(phys, size))

    def invalidate(self, phys: int, size: int) -> int:
        """Drop the lines of the range; dirty ones at a ragged end are cleaned first. Returns the bytes dropped."""
        self.memory.region_at(phys, size)
        dropped = 0
        for base in self._bases(phys, size):
            if base < phys or base + self.line > phys + size:
                self._write_back(base)
            self._dirty.discard(base)
            dropped += self.line if self._lines.pop(base, None) is not None else 0
        return dropped

    def snoop(self, phys: int, size: int, *, write: bool) -> None:
        """What a coherent device's access does first: dirty lines reach memory, and a write drops the copies."""
        for base in self._bases(phys, size):
            self._write_back(base)
            if write:
                self._lines.pop(base, None)

    @property
    def dirty_bytes(self) -> int:
        """Bytes that memory does not have yet."""
        return len(self._dirty) * self.line

    def _bases(self, phys: int, size: int) -> range:
        return range(phys & -self.line, phys + size, self.line)

    def _fetch(self, base: int) -> bytearray:
        cached = self._lines.get(base)
        if cached is None:
            cached = self._lines[base] = bytearray(self.memory.view[base : base + self.line])
        return cached

    def _write_back(self, base: int) -> int:
        if base not in self._dirty:
            return 0
        self._dirty.remove(base)
        self.memory.view[base : base + self.line] = self._lines[base]
        return self.line

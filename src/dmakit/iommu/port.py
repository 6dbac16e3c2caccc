"""Ports: the only way in which a device model reaches memory.

A port carries the device's accesses page by page: each 4 KiB piece is translated on its own, so a request over many
pages may fault in the middle, and then the pages before the fault have been read or written, as with real bus
transactions. A blocked access raises FaultError and leaves a record in the unit's log. An address that translates but
names no memory (an unmapped hole of the physical address space) is a FaultError too; nobody answers on the bus, and
no record is written.

``DmaPort`` translates through an IOMMU unit, or through the device's own TLB where it has one. ``DirectPort`` is the
port of a machine without IOMMU or of a device in passthrough: bus addresses are physical addresses.

*Peers.* Addresses of a peer device's BAR below the same switch are routed there by the switch before any IOMMU sees
them (``add_peer``), unless ACS redirects them upward.

*Coherence.* A coherent port snoops the CPU's cache (``memory.cache``): dirty lines reach memory before the device
reads, and the CPU's copies go when it writes. A port that is not coherent bypasses the cache, so forgotten cache
maintenance shows.
"""

from __future__ import annotations

from typing import Any

import cython

from dmakit.errors import ExhaustedError, FaultError, MisuseError
from dmakit.iommu.faults import device_name, fault_error
from dmakit.memory.cache import CpuCache

if cython.compiled:
    from cython.cimports.cpython.bytes import PyBytes_AS_STRING, PyBytes_FromStringAndSize
    from cython.cimports.libc.string import memcpy, memmove
else:
    from dmakit.consts import EIO, PAGE_MASK_LOW, PAGE_SIZE
    from dmakit.iommu.devtlb import DeviceTlb
    from dmakit.iommu.unit import IommuUnit
    from dmakit.memory.physical import PhysicalMemory
    from dmakit.turn import Turn

ALL_ONES = (1 << 64) - 1
MOST_BYTES = 1 << 47


def _room(size: int) -> Any:
    """``size`` bytes to read into; ExhaustedError when the host has no room for them."""
    try:
        if size > MOST_BYTES:
            raise MemoryError
        if cython.compiled:
            return PyBytes_FromStringAndSize(cython.NULL, size)
        return bytearray(size)
    except MemoryError:
        raise ExhaustedError(f"read: no memory for {size} bytes") from None


@cython.cclass
class Port:
    """What both kinds share: splitting, snooping, the bytes. ``source`` is the requester id (bus << 8 | devfn)."""

    def __init__(
        self,
        memory: PhysicalMemory,
        *,
        source: int = 0,
        name: str = "",
        coherent: bool = True,
        cache: CpuCache | None = None,
    ) -> None:
        if not 0 <= source <= 0xFFFF:
            raise MisuseError(f"source={source:#x}: a requester id has 16 bits")
        self.memory = memory
        self.turn = Turn()
        self.source = source
        self.name = name or device_name(source)
        self.coherent = coherent
        self.cache = cache
        self.low = 0
        self.high = 0
        self.lost = 0
        self.stopped = 0
        self.routed = False
        self.peers: list[tuple[int, int, int]] = []

    def add_peer(self, bus: int, size: int, phys: int) -> None:
        """The switch above routes [bus, bus+size) to a peer's memory at ``phys``."""
        self._check(bus, size)
        self.memory.region_at(phys, size)
        self.peers.append((bus, bus + size, phys))
        self.routed = True

    def read(self, iova: int, size: int) -> bytes:
        """``size`` bytes from device address ``iova``; FaultError names the first address that is blocked."""
        self._check(iova, size)
        found = _room(size)
        if cython.compiled:
            self._load(iova, cython.cast(cython.p_uchar, PyBytes_AS_STRING(found)), size)
            return found
        self._load(iova, memoryview(found), size)
        return bytes(found)

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` from device address ``iova`` on; pages before a FaultError have been written."""
        payload = memoryview(data).cast("B")
        size = len(payload)
        self._check(iova, size)
        if cython.compiled:
            source: cython.const[cython.uchar][::1] = payload
            if size:
                self._store(iova, cython.address(source[0]), size)
        else:
            self._store(iova, payload, size)

    def _load(self, iova: cython.ulonglong, into: cython.pointer[cython.uchar], size: cython.ulonglong) -> cython.int:
        """``read`` into a buffer (interpreted: a memoryview), for callers that checked the addresses."""
        self.turn._wait()
        if self._take(iova, into, size) != 0:
            raise self._refusal(self.stopped, False)
        return 0

    def _take(self, iova: cython.ulonglong, into: cython.pointer[cython.uchar], size: cython.ulonglong) -> cython.int:
        """``_load`` without the GIL; −EIO, with the place in ``stopped``, when an access is refused."""
        done: cython.ulonglong = 0
        phys: cython.ulonglong
        length: cython.ulonglong
        while done < size:
            length = min(size - done, PAGE_SIZE - ((iova + done) & PAGE_MASK_LOW))
            phys = self._touch(iova + done, length, False)
            if phys == ALL_ONES:
                self.stopped = iova + done
                return -EIO
            if cython.compiled:
                memcpy(cython.address(into[done]), cython.address(self.memory.data[phys]), length)
            else:
                into[done : done + length] = self.memory.view[phys : phys + length]
            done += length
        return 0

    def _store(self, iova: cython.ulonglong, source: cython.p_const_uchar, size: cython.ulonglong) -> cython.int:
        """``write`` from a buffer (interpreted: a memoryview)."""
        done: cython.ulonglong = 0
        phys: cython.ulonglong
        length: cython.ulonglong
        while done < size:
            length = min(size - done, PAGE_SIZE - ((iova + done) & PAGE_MASK_LOW))
            phys = self._reach(iova + done, length, True)
            if cython.compiled:
                memmove(cython.address(self.memory.data[phys]), cython.address(source[done]), length)
            else:
                self.memory.view[phys : phys + length] = source[done : done + length]
            done += length
        return 0

    def locate(self, iova: int, write: bool = False) -> int:
        """The physical address behind one device address, by the same way as an access; FaultError when blocked."""
        self._check(iova, 1)
        self.turn._wait()
        phys = int(self._locate(iova, write))
        if phys == ALL_ONES:
            raise self._blocked(iova, write)
        return phys

    @cython.exceptval(1, check=True)
    def _reach(self, iova: cython.ulonglong, length: cython.ulonglong, write: cython.bint) -> cython.ulonglong:
        """Physical address of a piece inside one page, checked to be memory and snooped."""
        self.turn._wait()
        phys: cython.ulonglong = self._touch(iova, length, write)
        if phys == ALL_ONES:
            raise self._refusal(iova, write)
        return phys

    def _touch(self, iova: cython.ulonglong, length: cython.ulonglong, write: cython.bint) -> cython.ulonglong:
        """``_reach`` that answers all ones for a refusal: ``lost`` is where nobody answers, or all ones (blocked)."""
        phys: cython.ulonglong
        if self.routed:
            phys = self._peer(iova)
            if phys != ALL_ONES:
                return phys
        phys = self._locate(iova, write)
        self.lost = phys
        if phys == ALL_ONES:
            return ALL_ONES
        known: cython.bint = self.low <= phys < self.high and length <= self.high - phys
        if not known and not self._find_memory(phys, length):
            return ALL_ONES
        if self.coherent and self.cache is not None:
            self._snoop(phys, length, write)
        return phys

    def _peer(self, iova: cython.ulonglong) -> cython.ulonglong:
        """Where the switch routes an address, or all ones."""
        for start, end, peer in self.peers:
            if start <= iova < end:
                return peer + iova - start
        return ALL_ONES

    def _find_memory(self, phys: cython.ulonglong, length: cython.ulonglong) -> cython.bint:
        """Remember the memory region of an access, so that the next one there need not look it up."""
        try:
            region = self.memory.region_at(phys, length)
        except MisuseError:
            return False
        self.low, self.high = region.start, region.end
        return True

    def _snoop(self, phys: cython.ulonglong, length: cython.ulonglong, write: cython.bint) -> cython.int:
        """Let the CPU's cache know of an access."""
        if self.cache is not None:
            self.cache.snoop(phys, length, write=write)
        return 0

    def _refusal(self, iova: int, write: bool) -> FaultError:
        """The error for an access that ``_touch`` refused."""
        return self._blocked(iova, write) if self.lost == ALL_ONES else self._unanswered(iova, self.lost, write)

    def _check(self, iova: int, size: int) -> None:
        if iova < 0 or size < 0 or iova + size > 1 << 64:
            raise MisuseError(f"[{iova:#x}, {iova + size:#x}): a device's accesses lie in 64 bits of address space")

    def _unanswered(self, iova: int, phys: int, write: bool) -> FaultError:
        action = "write" if write else "read"
        message = f"device {self.name} may not {action} {iova:#x}: no memory answers at {phys:#x}"
        return FaultError(message, iova=iova, write=write)

    def _blocked(self, iova: int, write: bool) -> FaultError:
        """The error for an access to which ``_locate`` answered all ones."""
        return self._unanswered(iova, iova, write)

    def _locate(self, iova: cython.ulonglong, write: cython.bint) -> cython.ulonglong:
        """Physical address for a device address, or all ones."""
        return iova


@cython.final
@cython.cclass
class DirectPort(Port):
    """No IOMMU, or passthrough: a device address is a physical address."""


@cython.final
@cython.cclass
class DmaPort(Port):
    """Translated by ``unit`` as domain ``did``; ``devtlb`` (ATS) when the device has one and it is attached."""

    def __init__(
        self,
        memory: PhysicalMemory,
        unit: IommuUnit,
        did: int,
        *,
        source: int = 0,
        name: str = "",
        coherent: bool = True,
        cache: CpuCache | None = None,
        devtlb: DeviceTlb | None = None,
    ) -> None:
        super().__init__(memory, source=source, name=name, coherent=coherent, cache=cache)
        if unit.memory is not memory:
            raise MisuseError("memory: must be the memory that the IOMMU unit walks")
        if devtlb is not None and (devtlb not in unit.devtlbs or devtlb.did != did):
            raise MisuseError(f"devtlb of requester {devtlb.source:#x}: is not attached to domain {did} of this unit")
        self.unit = unit
        self.turn = unit.ledger.turn  # an access changes caches and the fault log
        self.did = did
        self.devtlb = devtlb

    def _blocked(self, iova: int, write: bool) -> FaultError:
        return fault_error(self.source, iova, write, self.unit.last_reason, self.name)

    def _locate(self, iova: cython.ulonglong, write: cython.bint) -> cython.ulonglong:
        """Through the device's own TLB if there is one, else an untranslated request to the unit."""
        if self.devtlb is not None:
            return self.unit._translate_ats(self.devtlb, iova, write)
        return self.unit._translate(self.did, iova, write, self.source)

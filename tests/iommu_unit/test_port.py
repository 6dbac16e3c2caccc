"""Ports: bytes page by page, faults in the middle, coherence, direct ports."""

from __future__ import annotations

import pytest

from dmakit.errors import FaultError, MisuseError
from dmakit.iommu.port import DirectPort, DmaPort
from dmakit.memory.cache import CpuCache
from dmakit.memory.physical import PhysicalMemory

from .bench import SPAN, Bench


def test_bytes_travel_page_by_page_to_scattered_memory() -> None:
    b = Bench()
    physes = [0x900000, 0x300000, 0x500000]
    for i, phys in enumerate(physes):
        b.tables.map(0x10000 + i * 4096, phys)
    data = bytes(i % 251 for i in range(3 * 4096 - 200))
    b.port.write(0x10064, data)
    assert b.memory.read(0x900064, 4096 - 0x64) == data[: 4096 - 0x64]
    assert b.memory.read(0x300000, 4096) == data[4096 - 0x64 : 8192 - 0x64]
    assert b.port.read(0x10064, len(data)) == data
    assert b.counts() == {"walk_reads": 6, "psc_hits": 2, "iotlb_misses": 3, "iotlb_hits": 3}
    assert b.port.locate(0x11008) == 0x300008
    assert b.port.read(0x10000, 0) == b""


def test_a_fault_in_the_middle_leaves_the_pages_before_it_done() -> None:
    b = Bench()
    b.tables.map(0x10000, 0x900000)
    b.tables.map(0x12000, 0x902000)
    with pytest.raises(FaultError) as caught:
        b.port.write(0x10800, bytes(range(1, 251)) * 40)
    assert str(caught.value) == "device 00:04.0 may not write 0x11000: no write access is set (reason 0x5)"
    assert (caught.value.iova, caught.value.write, caught.value.errno) == (0x11000, True, 14)
    assert b.memory.read(0x900800, 2) == b"\x01\x02"
    assert b.memory.read(0x902000, 2) == b"\0\0"
    assert [(r.iova, r.write, r.source) for r in b.unit.faults] == [(0x11000, True, 0x20)]


def test_an_address_without_memory_behind_it_is_the_devices_fault() -> None:
    b = Bench(span=SPAN * 2)
    b.tables.map(0x1000, SPAN)
    with pytest.raises(FaultError, match=r"^device 00:04.0 may not read 0x1010: no memory answers at 0x4000010$"):
        b.port.read(0x1010, 4)
    assert b.unit.faults == []
    b.memory.add_region(SPAN, 4096, "bar", name="nvme0 cmb")
    b.port.write(0x1010, b"bar!")
    assert b.memory.read(SPAN + 0x10, 4) == b"bar!"


def test_a_direct_port_uses_physical_addresses() -> None:
    memory = PhysicalMemory(1 << 20)
    memory.add_region(0, 1 << 19)
    port = DirectPort(memory, name="nvme0")
    port.write(0xFF0, bytes(range(64)))
    assert memory.read(0xFF0, 64) == port.read(0xFF0, 64) == bytes(range(64))
    assert port.locate(0x1234, True) == 0x1234
    with pytest.raises(FaultError, match=r"^device nvme0 may not write 0x80000: no memory answers at 0x80000$"):
        port.write((1 << 19) - 4, bytes(8))
    with pytest.raises(MisuseError, match=r"^\[-0x1, 0x3\): a device's accesses lie in 64 bits of address space$"):
        port.read(-1, 4)
    with pytest.raises(MisuseError, match=r"a device's accesses lie in 64 bits"):
        port.read((1 << 64) - 1, 2)
    with pytest.raises(FaultError, match=r"no memory answers at 0xffffffffffffffff"):
        port.read((1 << 64) - 1, 1)


def test_a_coherent_port_snoops_the_cpus_cache_and_another_bypasses_it() -> None:
    b = Bench()
    b.tables.map(0x1000, 0x900000)
    cache = CpuCache(b.memory)
    coherent = DmaPort(b.memory, b.unit, b.did, cache=cache)
    other = DmaPort(b.memory, b.unit, b.did, cache=cache, coherent=False)
    cache.write(0x900000, b"cpu data")
    assert other.read(0x1000, 8) == bytes(8)
    assert coherent.read(0x1000, 8) == b"cpu data" == other.read(0x1000, 8)
    other.write(0x1000, b"unseen..")
    assert cache.read(0x900000, 8) == b"cpu data"
    cache.write(0x900008, b"beside")
    coherent.write(0x1000, b"device.")
    assert cache.read(0x900000, 14) == b"device." + b"a" + b"beside"
    cache.clean(0x900000, 64)
    assert coherent.read(0x1000, 14) == b"device.abeside"


def test_ports_refuse_what_does_not_belong_together() -> None:
    b, other = Bench(), Bench()
    with pytest.raises(MisuseError, match=r"^memory: must be the memory that the IOMMU unit walks$"):
        DmaPort(other.memory, b.unit, b.did)
    with pytest.raises(MisuseError, match=r"^source=0x10000: a requester id has 16 bits$"):
        DmaPort(b.memory, b.unit, b.did, source=0x10000)

"""The controller memory buffer: data from block to block without host memory, for the CPU and for a peer."""

from __future__ import annotations

import random

import pytest

from dmakit.errors import UnsupportedError
from dmakit.nvme.busmaster import MemoryBuffer
from dmakit.nvme.controller import Controller
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.software import SoftHost
from dmakit.nvme.spec import Reg
from dmakit.platform.soft import Machine

SIZE = 1 << 20


def rig() -> tuple[Machine, SoftHost, Namespace]:
    machine = Machine(ram="96M", swiotlb="1M", mode="strict")
    bar = machine.add_bar(SIZE, "cmb")
    space = Namespace(1, 8192)
    return machine, SoftHost(
        machine=machine, namespaces=[space], buffer=MemoryBuffer(machine.memory, bar.start, SIZE)
    ), space  # fmt: skip


def test_data_moves_inside_the_controller() -> None:
    machine, host, space = rig()
    payload = random.Random(1).randbytes(SIZE)
    space.write(0, payload)
    with Controller(host, strategy="premap") as controller:
        disk = controller.namespaces[1]
        with controller.memory_buffer() as buffer:
            assert buffer.size == SIZE
            port, read, write = host.model.port.port, [], []
            data_read, data_write = port.read, port.write
            host.model.port.port = Spy(data_read, data_write, read, write)
            disk.read_into(0, buffer)
            disk.write(4096, buffer)
            assert bytes(buffer.view) == payload and space.read(4096, 2048) == payload
            assert all(size <= 64 for size in read) and all(size <= 16 for size in write)  # rings, and no data
            host.model.port.port = port
            buffer.view[:4] = b"CPU!"
            disk.write(0, buffer, size=512)
            assert space.read(0, 1)[:4] == b"CPU!"
        assert host.model.read64(Reg.CMBMSC) == 0
    assert machine.live()["iova_ranges"] == 0


class Spy:
    """Notes the sizes of the accesses that leave the controller."""

    def __init__(self, read: object, write: object, reads: list[int], writes: list[int]) -> None:
        self._read, self._write, self.reads, self.writes = read, write, reads, writes

    def read(self, iova: int, size: int) -> bytes:
        self.reads.append(size)
        return self._read(iova, size)  # type: ignore[operator,no-any-return]

    def write(self, iova: int, data: bytes) -> None:
        self.writes.append(len(data))
        self._write(iova, data)  # type: ignore[operator]


def test_who_has_none_says_so() -> None:
    with (
        Controller.open("soft") as controller,
        pytest.raises(UnsupportedError, match=r"^soft:nvme0: this controller has no memory buffer \(CAP.CMBS\)$"),
    ):
        controller.memory_buffer()
    _, host, _ = rig()
    with (
        Controller(host, strategy="page") as controller,
        pytest.raises(UnsupportedError, match=r"^memory buffer: is registered memory, and the strategy is page$"),
    ):
        controller.memory_buffer()


def test_a_peer_reads_into_it_and_writes_from_it() -> None:
    machine, host, _ = rig()
    medium = Namespace(1, 8192)
    payload = random.Random(2).randbytes(SIZE)
    medium.write(0, payload)
    with (
        Controller(host, strategy="premap") as owner,
        Controller(SoftHost(machine=machine, namespaces=[medium]), strategy="premap") as peer,
        owner.memory_buffer() as buffer,
        peer.peer_buffer(buffer) as seen,
    ):
        peer.namespaces[1].read_into(0, seen)
        assert bytes(buffer.view) == payload
        owner.namespaces[1].write(64, buffer)  # out of its own memory: no byte has been in RAM
        assert owner.namespaces[1].read(64, 2048) == payload
        buffer.view[:4] = b"CPU!"
        peer.namespaces[1].write(4096, seen, size=512)
        assert medium.read(4096, 1) == b"CPU!" + payload[4:512]
    assert machine.live()["iova_ranges"] == 0
    _, other, _ = rig()
    with (
        Controller(other, strategy="two-step") as controller,
        pytest.raises(UnsupportedError, match=r"^peer buffer: is registered memory, and the strategy is two-step$"),
    ):
        controller.peer_buffer(seen)

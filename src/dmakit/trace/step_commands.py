"""Runs one command of a step file on the bench and reports what our stack answered, in the recording's fields.

The answer is a dict with the recorder's keys (``ret``, ``addr``, ``size``, ``tr`` …) plus ``events`` (what the call
caused) and ``warn`` (functions that warned). Errors become negative errnos: the recorder saw the kernel's return
values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dmakit.consts import L_IOVA_TREE
from dmakit.errors import DmakitError
from dmakit.trace.recorded_machine import ALL_ONES, compared
from dmakit.trace.step_bench import Bench, Slot, device_name
from dmakit.trace.step_events import warning_function
from dmakit.trace.step_file import Step

Answer = dict[str, Any]


class Commands:
    """The commands of the recorder's module, on our stack."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.memory = bench.machine.memory
        self.from_tree = False  # did the latest step's IOVA come from the tree?
        self._run: dict[str, Callable[[Step], Answer]] = {
            "dev": self._dev, "mask": self._mask, "seg": self._seg, "minalign": self._minalign, "buf": self._buf,
            "fill": self._fill, "peek": self._peek, "try": self._try, "link": self._link, "sync": self._sync,
            "unlink": self._unlink, "destroy": self._destroy, "free": self._free, "map": self._map,
            "unmap": self._unmap, "sg": self._sg, "unsg": self._unsg, "look": self._look, "wait": self._wait,
            "leaf": self._leaf,
        }  # fmt: skip

    def run(self, step: Step) -> Answer:
        """Run one step; its answer with ``events`` and ``warn``."""
        self.bench.take_events()
        counts = self.bench.machine.ledger.counts
        searched = counts[L_IOVA_TREE]
        answer = self._run[step.op](step)
        self.from_tree = counts[L_IOVA_TREE] != searched
        events = self.bench.take_events()
        if "look" in answer:
            self._describe(answer.pop("look"), answer)
        answer["events"] = compared(events)
        warned = [warning_function(event[1]) for event in events if event[0] == "warn"]
        answer["warn"] = [function for function in warned if function]  # a message (dev_warn) is not a WARNING
        return answer

    def _describe(self, slot: Slot, answer: Answer) -> None:
        """Add what the module reports of a slot after each call: the range and its translations."""
        if slot.device >= 0 and slot.span:
            answer.update(base=slot.base, span=slot.span, tr=self.bench.look(slot))

    # addresses ---------------------------------------------------------------------------------------------

    def phys(self, step: Step, index: int) -> int | None:
        """The physical address that word ``index`` names: bN+OFF, pADDR, or (in ``line``) tN+OFF by our translation."""
        word = str(step.record.get("line", step.record["cmd"])).split()[index]
        name, _, offset = word.partition("+")
        number, at = int(name[1:], 0), int(offset, 0) if offset else 0
        if name[0] == "b":
            buffer = self.bench.buffers.get(number)
            recorded: int | None = step.record.get("phys")
            return recorded if buffer is None else buffer + at
        if name[0] == "t":
            slot = self.bench.slot(name[1:])
            return slot.translation(self.bench.look(slot), at)
        return number + at

    def _number(self, step: Step, index: int) -> int:
        return int(step.words[index], 0)

    # set-up --------------------------------------------------------------------------------------------------

    def _dev(self, step: Step) -> Answer:
        device = self.bench.device(device_name(step))
        self.bench.devices[self._number(step, 1)] = device
        return {"ret": 0, "untrusted": int(not device.trusted), "domain_type": 11 if device.flush_queue else 3}

    def _mask(self, step: Step) -> Answer:
        self.bench.devices[self._number(step, 1)].set_mask((1 << self._number(step, 2)) - 1)
        return {"ret": 0}

    def _seg(self, step: Step) -> Answer:
        device = self.bench.devices[self._number(step, 1)]
        device.set_max_segment(self._number(step, 2))
        device.set_boundary(self._number(step, 3))
        return {}

    def _minalign(self, step: Step) -> Answer:
        self.bench.devices[self._number(step, 1)].set_min_align_mask(self._number(step, 2))
        return {}

    def _buf(self, step: Step) -> Answer:
        """Buffers lie where the kernel put them; fresh pages are zero."""
        phys, size = step.record["phys"], step.record["len"]
        self.bench.buffers[self._number(step, 1)] = phys
        self.memory.fill(phys, size, 0)
        return {"phys": phys, "len": 4096 << self._number(step, 2)}

    def _wait(self, step: Step) -> Answer:
        self.bench.machine.clock.advance(int(float(step.words[1]) * 1_000_000))
        return {}

    # memory --------------------------------------------------------------------------------------------------

    def _fill(self, step: Step) -> Answer:
        phys = self.phys(step, 1)
        if phys is None:
            return {"skipped": "no translation"}
        self.memory.fill(phys, self._number(step, 2), self._number(step, 3))
        return {}

    def _peek(self, step: Step) -> Answer:
        phys = self.phys(step, 1)
        if phys is None:
            return {"skipped": "no translation"}
        return {"phys": phys, "bytes": byte_runs(self.memory.read(phys, self._number(step, 2)))}

    # the two-step API ----------------------------------------------------------------------------------------

    def _try(self, step: Step) -> Answer:
        slot = self.bench.slot(step.words[1])
        slot.device = self._number(step, 2)
        phys, size = self.phys(step, 3), self._number(step, 4)
        slot.state = self.bench.devices[slot.device].try_alloc(phys, size, cpu=step.cpu)
        if slot.state:
            slot.cover(slot.state.addr, size)
        return {"phys": phys, "ret": int(bool(slot.state)), **self._state(slot), "look": slot}

    def _state(self, slot: Slot) -> Answer:
        return {"addr": slot.state.addr, "size": slot.state.size_word}

    def _call(self, slot: Slot, function: Callable[..., Any], *arguments: Any) -> Answer:
        """Run a call of the two-step API that may refuse; ``ret`` and the state afterwards."""
        try:
            function(*arguments)
            ret = 0
        except DmakitError as error:
            ret = -error.errno
        return {"ret": ret, **self._state(slot), "look": slot}

    def _link(self, step: Step) -> Answer:
        slot = self.bench.slot(step.words[1])
        phys = self.phys(step, 2)
        slot.direction = self._number(step, 5)
        arguments = (phys, self._number(step, 3), self._number(step, 4), slot.direction, self._number(step, 6))
        return {"phys": phys, **self._call(slot, slot.state.link, *arguments)}

    def _sync(self, step: Step) -> Answer:
        slot = self.bench.slot(step.words[1])
        return self._call(slot, slot.state.sync, self._number(step, 2), self._number(step, 3))

    def _void(self, slot: Slot, function: Callable[..., Any], *arguments: Any) -> Answer:
        """A call that returns nothing in the kernel: a refusal of ours shows as ``ret``."""
        answer = self._call(slot, function, *arguments)
        if answer["ret"] == 0:
            del answer["ret"]
        return answer

    def _unlink(self, step: Step) -> Answer:
        slot = self.bench.slot(step.words[1])
        offset, size, direction = (self._number(step, index) for index in (2, 3, 4))
        attrs = self._number(step, 5) if len(step.words) > 5 else 0
        return self._void(slot, slot.state.unlink, offset, size, direction, attrs)

    def _destroy(self, step: Step) -> Answer:
        slot = self.bench.slot(step.words[1])
        return self._void(slot, slot.state.destroy, *(self._number(step, index) for index in (2, 3, 4)))

    def _free(self, step: Step) -> Answer:
        slot = self.bench.slot(step.words[1])
        return self._void(slot, slot.state.free)

    # the classic API -----------------------------------------------------------------------------------------

    def _map(self, step: Step) -> Answer:
        slot = self.bench.slot(step.words[1])
        slot.device = self._number(step, 2)
        phys = self.phys(step, 3)
        slot.size, slot.direction, slot.attrs = (self._number(step, index) for index in (4, 5, 6))
        device = self.bench.devices[slot.device]
        try:
            slot.addr = device.map_phys(phys, slot.size, slot.direction, slot.attrs, cpu=step.cpu)
            slot.cover(slot.addr, slot.size)
            ret = 0
        except DmakitError as error:
            # dma_mapping_error knows one errno, whatever the cause
            slot.addr, ret = ALL_ONES, -12 if error.errno else 0
        return {"phys": phys, "ret": ret, "addr": slot.addr, "look": slot}

    def _refusal(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Answer:
        """A call that returns nothing in the kernel: nothing, or ``ret`` when ours refused."""
        try:
            function(*arguments, **options)
        except DmakitError as error:
            return {"ret": -error.errno}
        return {}

    def _unmap(self, step: Step) -> Answer:
        slot = self.bench.slot(step.words[1])
        device = self.bench.devices[slot.device]
        return {
            **self._refusal(device.unmap_phys, slot.addr, slot.size, slot.direction, slot.attrs, cpu=step.cpu),
            "look": slot,
        }

    def _sg(self, step: Step) -> Answer:
        slot = self.bench.slot(step.words[1])
        slot.device, slot.direction, slot.attrs = (self._number(step, index) for index in (2, 3, 4))
        device = self.bench.devices[slot.device]
        places = range(5, len(step.words) - 1, 2)
        named = [(self.phys(step, i), self._number(step, i + 1)) for i in places]
        recorded = step.record.get("in", [])
        segments = [
            (recorded[i][0] if phys is None and i < len(recorded) else phys or 0, size)
            for i, (phys, size) in enumerate(named)
        ]
        answer: Answer = {"max_seg": device.max_segment, "boundary": device.boundary, "in": _lists(segments)}
        try:
            slot.mapping = device.map_sg(segments, slot.direction, slot.attrs, cpu=step.cpu)
            out = [(int(addr), int(length)) for addr, length in slot.mapping.segments]
            slot.cover(out[0][0], out[-1][0] + out[-1][1] - out[0][0])
        except DmakitError:
            out = []  # dma_map_sg_attrs answers 0 whatever the error was
        return {**answer, "ret": len(out), "out": _lists(out), "sg_after": _lists(segments), "look": slot}

    def _unsg(self, step: Step) -> Answer:
        slot = self.bench.slot(step.words[1])
        if slot.mapping is None:
            return {"ret": -22, "look": slot}
        answer = self._refusal(self.bench.devices[slot.device].unmap_sg, slot.mapping, cpu=step.cpu)
        slot.mapping = None
        return {**answer, "look": slot}

    # looking -------------------------------------------------------------------------------------------------

    def _look(self, step: Step) -> Answer:
        return {"look": self.bench.slot(step.words[1])}

    def _leaf(self, step: Step) -> Answer:
        return {"leaves": self.bench.leaves(self.bench.slot(step.words[1]))}


def _lists(pairs: list[tuple[int, int]]) -> list[list[int]]:
    return [[first, second] for first, second in pairs]


def byte_runs(data: bytes) -> list[list[int]]:
    """[offset, length, byte] runs of equal bytes."""
    runs: list[list[int]] = []
    for offset, byte in enumerate(data):
        if runs and runs[-1][2] == byte:
            runs[-1][1] += 1
        else:
            runs.append([offset, 1, byte])
    return runs

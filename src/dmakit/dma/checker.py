"""The contract checker: the dma-debug that Linux lacks for ``dma_iova_*``, with the classic calls beside it.

The public methods of ``Device`` and ``IovaState`` tell it about every call (hooks below). In mode ``raise`` a broken
rule is a ``MisuseError`` whose ``rule`` is the rule's name, raised before the call runs where that is possible, so
that nothing has changed. In mode ``collect`` it is a line in ``reports`` and the call goes on, as dma-debug does.
The rules are those of ``dma.contract_rules``; ``dma.window_contract`` holds the ones of the two-step calls.

Three kinds of finding: what the caller does wrong, what the device does wrong with a correct mapping (seen when it
accesses through ``Device.dma_read/dma_write``), and what the mapping stack itself does wrong: after a link, unlink
or destroy the checker looks whether translations, bounce slots and IOVAs are what the call promised. That is how it
names Linux's known defects when one is switched on.

Hooks come in pairs: one before a call checks it, one after it keeps the books and verifies; a call that fails
changes nothing in the books. One checker serves one or more devices. It never changes what the stack does or counts
(but a machine with a checker keeps ``need_unmap`` true, as dma-debug does). docs/contract_checker.md is its manual.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dmakit import consts
from dmakit.dma.contract_rules import RULES
from dmakit.dma.window_contract import Finding, Tap, Window
from dmakit.errors import MisuseError

_ERROR_COOKIES = (0, (1 << 64) - 1)
_LINE = 64  # bytes of a CPU cache line


class Report(NamedTuple):
    """One finding: the rule's name, what happened, on which device."""

    rule: str
    text: str
    device: str

    def __str__(self) -> str:
        return f"{self.device}: {self.text} [{self.rule}: {RULES[self.rule].text}]"


class Mapping(NamedTuple):
    """A live classic mapping; ``kind`` names the call that made it."""

    addr: int
    size: int
    phys: int
    direction: int
    attrs: int
    kind: str


class _Books:
    """What the checker knows about one device."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.mappings: dict[int, list[Mapping]] = {}
        self.undone: set[int] = set()
        self.windows: dict[int, Window] = {}
        self.sgs: dict[int, tuple[Any, list[tuple[int, int]]]] = {}
        self.lines: dict[int, int] = {}

    def live(self) -> Iterator[Mapping]:
        """Every live classic mapping, one entry an output segment."""
        for found in self.mappings.values():
            yield from found

    def holding(self, addr: int, size: int) -> Mapping | None:
        """A mapping that holds all of [addr, addr + size), one that begins there before others."""
        first = self.mappings.get(addr, [])
        fitting = (one for one in (*first, *self.live()) if one.addr <= addr and addr + size <= one.addr + one.size)
        return next(fitting, None)

    def add(self, mapping: Mapping) -> None:
        self.mappings.setdefault(mapping.addr, []).append(mapping)
        self.undone.discard(mapping.addr)

    def remove(self, mapping: Mapping) -> None:
        found = self.mappings[mapping.addr]
        found.remove(mapping)
        if not found:
            del self.mappings[mapping.addr]
        self.undone.add(mapping.addr)


class ContractChecker:
    """Checks the calls of the devices it is given to; ``reports`` holds what mode ``collect`` found."""

    def __init__(self, mode: str = "raise") -> None:
        if mode not in ("raise", "collect"):
            raise MisuseError(f"mode={mode!r}: must be 'raise' or 'collect'")
        self.mode = mode
        self.reports: list[Report] = []
        self._books: dict[int, _Books] = {}

    def rules_broken(self) -> list[str]:
        """The names of the rules in ``reports``, in order of first appearance."""
        return list(dict.fromkeys(report.rule for report in self.reports))

    def _of(self, device: Any) -> _Books:
        key = id(device)
        if key not in self._books:
            self._books[key] = _Books(device)
        return self._books[key]

    def _report(self, device: Any, rule: str, text: str, errno: int = consts.EINVAL) -> None:
        report = Report(rule, text, device.name)
        self.reports.append(report)
        if self.mode == "raise":
            raise MisuseError(str(report), errno, rule=rule)

    def _report_all(self, device: Any, findings: Iterable[Finding]) -> bool:
        """Report each finding; whether there was any."""
        found = list(findings)
        for rule, text, errno in found:
            self._report(device, rule, text, errno)
        return bool(found)

    # Classic calls -------------------------------------------------------------------------------------------

    def mapping(self, device: Any, phys: int, size: int, direction: int, attrs: int) -> None:
        """Before ``map_phys`` (or a scatterlist's entry): is this memory what the attributes say?"""
        what = f"map of [{phys:#x}, {phys + size:#x})"
        ram = device.memory.is_ram(phys) and device.memory.is_ram(phys + size - 1)
        if not ram and not attrs & consts.ATTR_MMIO:
            self._report(device, "not-ram", f"{what} is not RAM")
        if ram and attrs & consts.ATTR_MMIO:
            self._report(device, "mmio-of-ram", f"{what} is RAM, mapped with MMIO")
        if self._shares_lines(device, direction, attrs):
            lines = range(phys // _LINE, (phys + size - 1) // _LINE + 1)
            shared = next((line for line in lines if line in self._of(device).lines), None)
            if shared is not None:
                self._report(device, "cacheline-overlap", f"{what}: cache line {shared * _LINE:#x} is mapped already")

    def _shares_lines(self, device: Any, direction: int, attrs: int) -> bool:
        """Whether cache lines of such a mapping must be its own."""
        ignored = consts.ATTR_MMIO | consts.ATTR_SKIP_CPU_SYNC | consts.ATTR_DEBUGGING_IGNORE_CACHELINES
        return not device.coherent and direction != consts.DMA_TO_DEVICE and not attrs & ignored

    def _count_lines(self, device: Any, phys: int, size: int, direction: int, attrs: int, step: int) -> None:
        if not self._shares_lines(device, direction, attrs):
            return
        lines = self._of(device).lines
        for line in range(phys // _LINE, (phys + size - 1) // _LINE + 1):
            lines[line] = lines.get(line, 0) + step
            if lines[line] <= 0:
                del lines[line]

    def mapped(self, device: Any, addr: int, phys: int, size: int, direction: int, attrs: int) -> None:
        """``map_phys`` succeeded."""
        self._of(device).add(Mapping(addr, size, phys, direction, attrs, "map_phys"))
        self._count_lines(device, phys, size, direction, attrs, 1)

    def unmapping(self, device: Any, addr: int, size: int, direction: int, attrs: int) -> None:
        """Before ``unmap_phys``."""
        books = self._of(device)
        what = f"unmap of [{addr:#x}, {addr + size:#x})"
        found = books.mappings.get(addr)
        if not found:
            self._report_unknown(books, addr, what)
            return
        wanted = (size, direction)
        mapping = next((one for one in found if (one.size, one.direction) == wanted), found[0])
        if mapping.kind != "map_phys":
            self._report(device, "unmap-kind", f"{what} by unmap_phys, mapped by {mapping.kind}")
            return
        if mapping.size != size:
            self._report(device, "unmap-size", f"{what}: mapped were {mapping.size:#x} bytes, not {size:#x}")
        if mapping.direction != direction:
            text = f"{what} passes direction {direction}, mapped with {mapping.direction}"
            self._report(device, "unmap-direction", text)
        if (mapping.attrs ^ attrs) & consts.ATTR_MMIO:
            self._report(device, "unmap-attrs", f"{what} passes attrs {attrs:#x}, mapped with {mapping.attrs:#x}")
        books.remove(mapping)
        self._count_lines(device, mapping.phys, mapping.size, mapping.direction, mapping.attrs, -1)

    def _report_unknown(self, books: _Books, addr: int, what: str) -> None:
        """``addr`` is not what map_phys returned: say what it is instead."""
        device = books.device
        if addr in _ERROR_COOKIES:
            self._report(device, "error-cookie", f"{what}: a failed map returned this")
        elif any(window.addr <= addr < window.addr + window.size for window in books.windows.values()):
            self._report(device, "unmap-kind", f"{what} by unmap_phys, but it lies in a window of try_alloc")
        elif any(memory.addr <= addr < memory.addr + memory.size for memory in device.allocations):
            self._report(device, "unmap-kind", f"{what} by unmap_phys, but it lies in coherent memory")
        elif addr in books.undone:
            self._report(device, "double-unmap", f"{what}: it was unmapped already")
        else:
            self._report(device, "not-mapped", f"{what}: nothing was mapped there")

    def syncing(self, device: Any, addr: int, size: int, direction: int, for_cpu: bool) -> None:
        """Before ``sync_single_for_cpu`` and ``sync_single_for_device``."""
        books = self._of(device)
        what = f"sync of [{addr:#x}, {addr + size:#x}) for the {'CPU' if for_cpu else 'device'}"
        mapping = books.holding(addr, size)
        if mapping is None:
            if addr in _ERROR_COOKIES:
                self._report(device, "error-cookie", f"{what}: a failed map returned this")
            elif books.holding(addr, 1) is not None:
                self._report(device, "sync-outside", f"{what} reaches beyond its mapping")
            else:
                self._report(device, "not-mapped", f"{what}: nothing is mapped there")
        elif mapping.direction not in (consts.DMA_BIDIRECTIONAL, direction):
            text = f"{what} passes direction {direction}, mapped with {mapping.direction}"
            self._report(device, "sync-direction", text)

    # Scatterlists --------------------------------------------------------------------------------------------

    def mapped_sg(self, device: Any, sg: Any) -> None:
        """``map_sg`` succeeded: are its entries and its output what they should be?"""
        books = self._of(device)
        for addr, length in sg.segments:
            books.add(Mapping(addr, length, 0, sg.direction, sg.attrs, "map_sg"))
        books.sgs[id(sg)] = (sg, sg.inputs)
        self._check_entries(device, sg)
        if any(addr in _ERROR_COOKIES for addr, _ in sg.segments):
            self._report(device, "sg-output", "map_sg left an output segment without an address", consts.EFAULT)
        given, got = sum(length for _, length in sg.inputs), sum(length for _, length in sg.segments)
        if given != got:
            self._report(device, "sg-output", f"map_sg gave {got:#x} bytes for {given:#x}", consts.EFAULT)

    def _check_entries(self, device: Any, sg: Any) -> None:
        for phys, length in sg.inputs:
            if length > device.max_segment:
                text = f"map_sg entry {phys:#x} of {length:#x} bytes: max_segment is {device.max_segment:#x}"
                self._report(device, "sg-segment-length", text)
        for addr, length in sg.segments:
            if addr not in _ERROR_COOKIES and (addr ^ (addr + length - 1)) & ~device.boundary:
                text = f"map_sg segment [{addr:#x}, {addr + length:#x}) crosses the boundary {device.boundary:#x}"
                self._report(device, "sg-segment-boundary", text)

    def unmapping_sg(self, device: Any, sg: Any) -> None:
        """Before ``unmap_sg``."""
        books = self._of(device)
        known = books.sgs.pop(id(sg), None)
        if known is None:
            self._report(device, "not-mapped", f"unmap_sg of a list of {sg.entries} entries that is not mapped")
            return
        for addr, length in sg.segments:
            found = next(
                (one for one in books.mappings.get(addr, ()) if (one.size, one.kind) == (length, "map_sg")), None
            )
            if found is not None:
                books.remove(found)
        if known[1] != sg.inputs:
            text = f"unmap_sg of {sg.entries} entries: {len(known[1])} were mapped, or their places changed"
            self._report(device, "sg-entries", text)

    def syncing_sg(self, device: Any, sg: Any, for_cpu: bool) -> None:
        """Before ``sync_sg_for_cpu`` and ``sync_sg_for_device``."""
        if id(sg) not in self._of(device).sgs:
            self._report(device, "not-mapped", f"sync_sg of a list of {sg.entries} entries that is not mapped")

    # Two steps -----------------------------------------------------------------------------------------------

    def allocated(self, device: Any, state: Any) -> None:
        """``try_alloc`` gave a window."""
        self._of(device).windows[id(state)] = Window(device, state)

    def _window(self, state: Any, call: str) -> Window | None:
        """The books of a live state; a state without is stale."""
        device = state.device
        window = None if device is None else self._of(device).windows.get(id(state))
        if window is None and device is not None:
            self._report(device, "stale-state", f"{call} of a state without a live window")
        return window

    def before_link(self, state: Any, phys: int, offset: int, size: int, direction: int, attrs: int) -> None:
        """Before ``link``."""
        window = self._window(state, "link")
        if window is not None:
            window.broken = False
            window.broken = self._report_all(window.device, window.check_link(phys, offset, size))

    def after_link(self, state: Any, phys: int, offset: int, size: int, direction: int, attrs: int) -> None:
        """``link`` succeeded."""
        window = self._window(state, "link")
        if window is not None:
            window.note_link(phys, offset, size, direction, attrs)
            what = f"link of [{offset:#x}, {offset + size:#x})"
            self._report_all(window.device, window.verify_link("link-not-mapped", what, window.pieces[-1:]))

    def link_failed(
        self, state: Any, phys: int, offset: int, size: int, direction: int, attrs: int, errno: int
    ) -> None:
        """``link`` failed: was it legal, and is everything else as it was?"""
        window = self._window(state, "link")
        if window is None:
            return
        what = f"link of [{offset:#x}, {offset + size:#x})"
        legal = not window.broken and direction != consts.DMA_NONE
        findings = list(window.verify_pieces("failed-link-damage", f"the failed {what}"))
        if not window.broken:
            findings += window.verify_gone("failed-link-damage", f"the failed {what}", offset, size)
        if legal and errno in (consts.EINVAL, consts.EIO, consts.EADDRINUSE):
            text = f"{what} to phys {phys:#x} keeps every rule and was refused with errno {errno}"
            findings.append(("legal-link-refused", text, errno))
        self._report_all(window.device, findings)

    def after_sync(self, state: Any, offset: int, size: int) -> None:
        """``sync`` succeeded."""
        window = self._window(state, "sync")
        if window is not None:
            window.unsynced.remove(offset, offset + size)

    def before_unlink(self, state: Any, offset: int, size: int, direction: int, attrs: int) -> None:
        """Before ``unlink``."""
        window = self._window(state, "unlink")
        if window is not None:
            findings = window.check_unlink("unlink", offset, size, direction, attrs)
            if not self._report_all(window.device, findings):
                self._watch_slots(window)

    def after_unlink(self, state: Any, offset: int, size: int) -> None:
        """``unlink`` returned."""
        window = self._window(state, "unlink")
        if window is None:
            return
        what = f"unlink of [{offset:#x}, {offset + size:#x})"
        window.note_unlink(offset, size)
        findings = list(self._slots_findings(window, "unlink"))
        findings += window.verify_gone("unlink-left-mapped", what, offset, size)
        findings += window.verify_pieces("unlink-lost-neighbour", what)
        self._report_all(window.device, findings)

    def before_destroy(self, state: Any, mapped_len: int, direction: int, attrs: int) -> None:
        """Before ``destroy``."""
        window = self._window(state, "destroy")
        if window is not None and not self._report_all(
            window.device, window.check_destroy(mapped_len, direction, attrs)
        ):
            self._watch_slots(window)

    def after_destroy(self, state: Any) -> None:
        """``destroy`` returned: the window is gone."""
        self._closed(state, "destroy")

    def before_free(self, state: Any) -> None:
        """Before ``free``."""
        window = self._window(state, "free")
        if window is not None:
            self._report_all(window.device, window.check_free())

    def after_free(self, state: Any) -> None:
        """``free`` returned: the window is gone."""
        self._closed(state, "free")

    def _closed(self, state: Any, call: str) -> None:
        """What a window that is gone must not have left behind."""
        window = self._window(state, call)
        if window is None:
            return
        del self._of(window.device).windows[id(state)]
        findings = [*self._slots_findings(window, call), *window.verify_freed(call)]
        pieces, window.pieces = window.pieces, []
        for piece in pieces:
            findings += window.verify_gone("unlink-left-mapped", call, piece.start, piece.end - piece.start)
        self._report_all(window.device, findings)

    def _watch_slots(self, window: Window) -> None:
        """Until the call is over: is a bounce slot released before the entries that lead to it are cleared?"""
        if window.state.bounced:
            window.tap = Tap(window.device.swiotlb, window.device.domain)

    def _slots_findings(self, window: Window, call: str) -> Iterator[Finding]:
        if window.tap is None:
            return
        names = [event[0] for event in window.tap.close()]
        window.tap = None
        if "tblunmap" in names and "unmap" in names and names.index("tblunmap") < names.index("unmap"):
            text = f"{call} released a bounce slot before the device lost access to it"
            yield "slot-freed-while-mapped", text, consts.EFAULT

    # The device ----------------------------------------------------------------------------------------------

    def accessed(self, device: Any, addr: int, size: int, write: bool) -> None:
        """The device's access to [addr, addr + size) went through: was it entitled to it?"""
        books = self._of(device)
        what = f"device {'write to' if write else 'read of'} [{addr:#x}, {addr + size:#x})"
        if size <= 0 or any(one.addr <= addr and addr + size <= one.addr + one.size for one in device.allocations):
            return
        for window in books.windows.values():
            start = addr - window.addr
            if start >= 0 and window.linked.covers(start, start + size):
                if window.unsynced.overlaps(start, start + size):
                    self._report(device, "use-before-sync", f"{what}: linked, but not synced")
                directions = {one.direction for one in window.pieces if one.start < start + size and start < one.end}
                self._check_direction(device, what, directions, write)
                return
        mapping = books.holding(addr, size)
        first = mapping or books.holding(addr, 1)
        if mapping is None and first is not None:  # mappings that meet are one range to a device
            cut = first.addr + first.size - addr
            self.accessed(device, addr, cut, write)
            self.accessed(device, addr + cut, size - cut, write)
        elif mapping is None:
            self._report(device, "device-access", f"{what}: not inside anything that is mapped", consts.EFAULT)
        else:
            self._check_direction(device, what, {mapping.direction}, write)

    def _check_direction(self, device: Any, what: str, directions: set[int], write: bool) -> None:
        allowed = {consts.DMA_BIDIRECTIONAL, consts.DMA_FROM_DEVICE if write else consts.DMA_TO_DEVICE}
        if directions - allowed:
            text = f"{what}: mapped with direction {min(directions - allowed)}"
            self._report(device, "device-access-direction", text, consts.EFAULT)

    def released(self, device: Any) -> None:
        """``Device.release``: nothing may be mapped any more."""
        books = self._books.pop(id(device), None)
        if books is None:
            return
        left = [f"a window of {window.size:#x} bytes at {window.addr:#x}" for window in books.windows.values()]
        left += [f"{one.kind} of {one.size:#x} bytes at {one.addr:#x}" for one in books.live()]
        if left:
            text = f"released with {len(left)} live mapping{'s' if len(left) > 1 else ''}, such as {left[0]}"
            self._report(device, "leak", text)

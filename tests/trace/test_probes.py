"""What ``record`` asks a kernel for, beside what the recorder of the project's kernel traces asked for."""

from __future__ import annotations

import lzma
import re
from collections import Counter
from pathlib import Path

import pytest

from dmakit.trace.events import EVENTS
from dmakit.trace.operations import KINDS
from dmakit.trace.probes import ALLOCATOR, MAPPING
from dmakit.trace.replay import replay_file

DATA = Path(__file__).parent.parent / "data"
TRACES = DATA / "kernel-traces"
#: Asked for then and not by ``record``: nobody reads them, and each says what another event says (docs/record.md).
REPEATED = {
    "iova/xfi_in": "__free_iova",
    "iova/rc_in": "iova_domain_init_rcaches",
    "dio/free_in": "iommu_dma_free_iova",
}
NAMES = {name.split("/")[1] for name in REPEATED}


def test_three_events_of_the_recorded_set_up_are_not_asked_for() -> None:
    recorded = dict(
        line.split() for line in (DATA / "recorded_events.txt").read_text().splitlines() if not line.startswith("#")
    )
    asked = {
        f"{probe.group}/{probe.name}": probe.function + "%return" * probe.on_return for probe in (*ALLOCATOR, *MAPPING)
    }
    assert len(recorded) == 30 and recorded == {**asked, **REPEATED}
    assert {event.name: event.symbol for event in EVENTS if event.name in NAMES} == {
        name.split("/")[1]: function for name, function in REPEATED.items()
    }, "a trace that has them is read all the same"
    assert not NAMES & set(KINDS), "an event that the replay looks at has to be asked for"


@pytest.mark.parametrize("name", ["smp1-lazy", "smp1-strict", "inval-cm-smp1", "sg-ahci"])
def test_a_trace_without_them_replays_the_same(name: str, tmp_path: Path) -> None:
    """Each ``free_in`` is the ``ff_in`` of the same range; the recorded kernels never came to the other two."""
    lines = lzma.decompress((TRACES / f"{name}.trace.txt.xz").read_bytes()).decode().splitlines(keepends=True)
    kept = [line for line in lines if not any(f" {event}: " in line for event in NAMES)]
    freed = Counter(
        (int(match[1], 16) >> 12, int(match[2]) >> 12)
        for line in lines
        if (match := re.search(r" free_in: .* iova=(0x[0-9a-f]+) size=(\d+)", line))
    )
    given_back = Counter(
        (int(match[1], 16), int(match[2]))
        for line in lines
        if (match := re.search(r" ff_in: .* pfn=(0x[0-9a-f]+) size=(\d+)", line))
    )
    assert len(lines) - len(kept) == freed.total() > 0 and freed == given_back
    path = tmp_path / "less.trace.txt"
    path.write_text("".join(kept))
    less = replay_file(path, boot=TRACES / f"{name}.boot.txt")
    whole = replay_file(TRACES / f"{name}.trace.txt.xz")
    assert (less.allocations, less.matched, less.operations) == (whole.allocations, whole.matched, whole.operations)
    assert less.matched > 0 and less.diverged == 0

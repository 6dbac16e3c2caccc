"""A fair court: named cases in which each side of the argument wins, with the counters that decide it.

The project takes no side between a loop of map_page, map_sg, two-step and premapped buffers. Each case is an
ordinary workload with ordinary options; ``dmakit compare case:NAME`` runs it and prints who wins and why.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmakit.lab.options import Options
from dmakit.lab.profile import cheaper
from dmakit.lab.workload import FioSpec
from dmakit.units import KIB


@dataclass(frozen=True, slots=True)
class Case:
    """A workload, the options it runs under, who wins against whom (empty: nobody), and the argument."""

    spec: FioSpec
    options: Options
    winner: str
    loser: str
    text: str


CASES: dict[str, Case] = {
    "loop-wins": Case(
        FioSpec((8 * KIB,), iodepth=8, requests=200, offset=2048),
        Options(mode="lazy", coherent=False),
        "page",
        "two-step",
        "8 KiB that start inside a page, for a device that does not snoop: linking a piece cleans its whole granules, "
        "the loop cleans only the buffer's own bytes",
    ),
    "sg-wins": Case(
        FioSpec((64 * KIB,), iodepth=4, requests=200, piece=2 * KIB),
        Options(mode="strict"),
        "sg",
        "two-step",
        "32 pieces of 2 KiB, each in a page of its own: they cannot become one range, so two-step falls back to one "
        "map and one invalidation a piece, while map_sg still takes one window and one invalidation",
    ),
    "two-step-wins": Case(
        FioSpec((128 * KIB,), iodepth=8, requests=200),
        Options(mode="strict"),
        "two-step",
        "sg",
        "32 scattered pages that meet on granules: the same window and invalidation as map_sg, without a table of "
        "scatterlist entries and its passes",
    ),
    "premap-changes-nothing": Case(
        FioSpec((128 * KIB,), iodepth=8, requests=200),
        Options(mode="passthrough"),
        "",
        "",
        "no translation and a coherent device: mapping costs nothing to begin with, so there is nothing to save",
    ),
}


def verdict(case: Case, prices: dict[str, tuple[float, float]]) -> str:
    """One line, computed: whether the case shows what it is there to show. ``prices``: modelled ns by strategy."""
    if case.winner:
        won = cheaper(prices[case.winner], prices[case.loser])
        return f"{case.winner} {'beats' if won else 'does NOT beat'} {case.loser}: {case.text}"
    same = prices["premap"] == prices["page"] == prices["two-step"]
    return f"premap {'changes nothing' if same else 'does NOT cost the same'}: {case.text}"

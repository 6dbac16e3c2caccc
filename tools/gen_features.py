"""Write docs/features.md: the feature table, each row with the tests that run its observable check.

The rows come from five kernel mailing-list threads (docs/features.md says which); a test belongs to a row by its
name: ``test_a13_…`` to A13. ``--check`` fails when the page is out of date or a row has no test.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "features.md"

ROWS = {
    "A1": "Allocate IOVA up front: after `try_alloc` the window is reserved, no PTE exists, device access faults",
    "A2": "IOVA for an unaligned physical start keeps the offset inside the granule",
    "A3": "Link writes PTEs only: no allocation, no flush",
    "A4": "Many links, one map-side sync",
    "A5": "Unlink clears and flushes before it returns, also in lazy mode; the window stays",
    "A6": "Destroy unlinks and frees in one pass: one flush, or one queue entry; the window is reusable at full size",
    "A7": "Destroy of nothing is free: no flush, the IOVA is returned",
    "A8": "Free returns the window: the next allocation of that order on that CPU gets it",
    "A9": "`use_iova` tells whether a window exists",
    "A10": "Fallback without IOMMU: the same workload, the same data",
    "A11": "`need_unmap`: false for direct and coherent, true after the first bounce or under debug",
    "A13": "Unaligned head and tail of an untrusted device are bounced alone, also when there is no middle",
    "A14": "Pads of bounce slots are zeroed",
    "A15": "The aligned middle is not copied",
    "A16": "Cache maintenance on link and unlink for devices that do not snoop",
    "A17": "The alignment contract: violations are errors without damage, a checker names the rule",
    "A18": "A failing link leaves earlier pieces intact and leaks nothing",
    "A19": "A link over a linked range fails",
    "A20": "Peer-to-peer without struct page: one look-up for a run of pages",
    "A21": "Peer-to-peer bus address: no PTE, the expected address; with ACS through the host bridge",
    "A22": "Peer-to-peer through a host bridge: MMIO attribute, no cache sync, no bounce (VT-d PTEs carry no MMIO bit)",
    "A23": "Peer-to-peer that is not supported is refused, nothing is mapped",
    "A24": "`map_sg` merges like Linux: boundary and maximum segment obeyed",
    "A25": "The loop of `map_page` is measured beside the others, and cases where it wins are shown",
    "A26": "IOVA caches: hits up to 128 KiB, 132 KiB always misses",
    "A27": "`map_phys` for RAM, MMIO, direct and bounced memory",
    "A28": "`map_resource`: MMIO without cache maintenance or bounce",
    "A29": "`iova_to_phys` is exact for every byte",
    "A30": "One segment stays one map: no window, ledger equal to the loop's",
    "A31": "Every request that leaves the fast path has a path and a reason",
    "A32": "Classic calls are unchanged by two-step users beside them",
    "A33": "Dispatch on the mapping path is counted",
    "A34": "Table memory is accounted and follows the formula",
    "A35": "Strict and lazy invalidation: counts, and the window in which a stale access works",
    "A36": "Every function and errno of the API is documented",
    "E1": "The one-shot path is laid out as the baseline: calls a stage",
    "E2": "The scatterlist baseline: bytes allocated a request, three passes against one",
    "E3": "bvec merging gives the reference's segments",
    "E5": "bio to PRP and SGL without a scatterlist: equal to reference lists, and back",
    "E6": "Coalescing to one SGL descriptor when the gaps allow it",
    "E8": "Pieces are linked by offset in any order",
    "E12": "Submission and completion are counted apart",
}
LATER = "A12, E4, E7, E9, E10 and E11 come with later consumers (RDMA on-demand paging, live migration)."
_TEST = re.compile(r"^\s*def (test_([ae]\d+)_\w+)", re.MULTILINE)


def tests() -> dict[str, list[str]]:
    """Row → tests named after it, as path::name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, row in _TEST.findall(path.read_text()):
            found.setdefault(row.upper(), []).append(f"{path.relative_to(ROOT)}::{name}")
    return found


def page() -> str:
    """The text of docs/features.md."""
    found = tests()
    lines = [
        "# Features, each with the test that shows it",
        "",
        "Rows A describe the two-step DMA mapping API (threads of October 2024), rows E the LSF/MM topic of 2024. A",
        "test named after a row runs the row's observable check; `./dmakit test -- -k a13` runs one row. " + LATER,
        "",
        "| row | what | tests |",
        "|---|---|---|",
    ]
    for row, text in ROWS.items():
        cells = "<br>".join(f"`{name}`" for name in found.get(row, [])) or "**none**"
        lines.append(f"| {row} | {text} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write, or check."""
    missing = [row for row in ROWS if row not in tests()]
    if "--check" in sys.argv[1:]:
        stale = not PAGE.exists() or PAGE.read_text() != page()
        print(f"rows without a test: {missing}" if missing else "stale" if stale else "ok")
        return 1 if missing or stale else 0
    PAGE.write_text(page())
    print(f"rows without a test: {', '.join(missing) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write the README's picture from a run: one scattered 128 KiB read through every strategy (``--check`` compares)."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

BEGIN, END = "<!-- picture: written by tools/readme_picture.py -->\n", "<!-- end of picture -->\n"
WORKLOAD = "bs=128k,iodepth=8,n=256"


def rows() -> list[tuple[str, float, float, float, float, str]]:
    """(strategy, IOVA allocations, PTE writes, invalidations, descriptors, modelled ns) per request."""
    from dmakit.lab.compare import compare
    from dmakit.lab.inputs import resolve
    from dmakit.lab.options import Options
    from dmakit.lab.sources import source_of

    found = []
    for result in compare(source_of(resolve(WORKLOAD)), Options(mode="strict").check()).results:
        assert result.wrong == 0
        ledger, count = result.ledger, result.requests
        allocations = sum(ledger[f"iova_{kind}"] for kind in ("magazine", "depot", "tree"))
        low, high = (value / count for value in result.modelled_ns)
        found.append(
            (
                result.name,
                allocations / count,
                ledger["pte_set_1"] / count,
                ledger["inv_page"] / count,
                ledger["descriptors"] / count,
                f"{low:,.0f}–{high:,.0f}",
            )
        )
    return found


def picture() -> str:
    """The block between the markers."""
    lines = ["```", "one 128 KiB read into 32 scattered pages, VT-d, strict mode, every byte checked", ""]
    heads = (
        ("IOVA allocations", 17),
        ("PTE writes", 12),
        ("invalidations", 15),
        ("descriptors", 13),
        ("modelled ns", 18),
    )
    lines.append(f"{'strategy':<12}" + "".join(f"{head:>{width}}" for head, width in heads))
    for name, *figures, modelled in rows():
        cells = "".join(f"{value:>{width},.0f}" for value, width in zip(figures, (17, 12, 15, 13), strict=True))
        lines.append(f"{name:<12}{cells}{modelled:>18}")
    lines += ["", f"again: ./dmakit compare {WORKLOAD} --mode strict", "```", ""]
    return "\n".join(lines)


def main() -> int:
    """Rewrite or check the README."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    fresh = head + BEGIN + picture() + END + tail
    if "--check" in sys.argv[1:]:
        return 0 if fresh == text else 1
    readme.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())

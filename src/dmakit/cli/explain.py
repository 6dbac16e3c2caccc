"""``dmakit explain``: which path each request took, why, and what would put it on the fast path.

With ``--platform vfio:BDF``: which requests a real controller got by windows and which by registered memory, and why.
"""

from __future__ import annotations

import argparse

from dmakit.cli import labargs


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``explain``."""
    labargs.configure(parser)
    parser.add_argument("--request", type=int, metavar="N", help="one request in detail")
    parser.add_argument("--reason", metavar="R", help="one reason in detail, with examples")


def run(args: argparse.Namespace) -> int:
    """Explain and print; on a real controller status 1 when a byte differs or a request failed."""
    from dmakit.cli.output import check_json, write_json
    from dmakit.lab import explain
    from dmakit.lab.report import print_detail, print_explanation

    check_json(args.json)
    document: dict[str, object]
    wrong = 0
    if args.platform.startswith("vfio:"):
        target, source = labargs.target_of(args), labargs.source_of(args)
        found, result = explain.explain_on_hardware(source, target, labargs.progress())
        document = {"input": source.name, "options": {"platform": args.platform, **target.describe()}}
        document["auto"], wrong = result.choice, result.wrong + result.failed
    else:
        options, source = labargs.options_of(args), labargs.source_of(args)
        found = explain.explain(source, options, labargs.progress())
        document = {"input": source.name, "options": options.describe()}
    detail = found.of_request(args.request) if args.request is not None else None
    lines = found.of_reason(args.reason) if args.reason is not None else [detail.line] if detail else found.lines
    document.update(requests=found.total, lines=[line.report() for line in lines], missing=source.missing())
    if detail is not None:
        document["request"] = detail.report()
    if args.json is not None:
        write_json(document, args.json)
    if args.json != "-":
        if detail is not None:
            print_detail(detail)
        print_explanation(lines, found.total, examples=bool(args.reason) or detail is not None)
        if found.costs is not None:
            print(found.costs)
        if wrong:
            print(f"bytes wrong or requests failed: {wrong}")
        for text in source.missing():
            print(f"not knowable from this trace: {text}")
    return 1 if wrong else 0

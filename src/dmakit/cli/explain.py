"""``dmakit explain``: which path each request took, why, and what would put it on the fast path."""

from __future__ import annotations

import argparse

from dmakit.cli import labargs


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``explain``."""
    labargs.configure(parser)
    parser.add_argument("--request", type=int, metavar="N", help="one request in detail")
    parser.add_argument("--reason", metavar="R", help="one reason in detail, with examples")


def run(args: argparse.Namespace) -> int:
    """Explain and print."""
    from dmakit.cli.output import check_json, write_json
    from dmakit.lab.explain import explain
    from dmakit.lab.report import print_detail, print_explanation

    check_json(args.json)
    options, source = labargs.options_of(args), labargs.source_of(args)
    found = explain(source, options, labargs.progress())
    detail = found.of_request(args.request) if args.request is not None else None
    lines = found.of_reason(args.reason) if args.reason is not None else [detail.line] if detail else found.lines
    if args.json is not None:
        document: dict[str, object] = {
            "input": source.name,
            "options": options.describe(),
            "requests": found.total,
            "lines": [line.report() for line in lines],
            "missing": source.missing(),
        }
        if detail is not None:
            document["request"] = detail.report()
        write_json(document, args.json)
    if args.json != "-":
        if detail is not None:
            print_detail(detail)
        print_explanation(lines, found.total, examples=bool(args.reason) or detail is not None)
        for text in source.missing():
            print(f"not knowable from this trace: {text}")
    return 0

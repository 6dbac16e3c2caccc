"""``dmakit nvme list|identify|read|write|verify|perf``: an NVMe controller driven from user space.

``--platform soft`` (or ``--soft``): a controller model on a software machine, with a namespace of 128 MiB, empty at
each start; ``--platform vfio:BDF``: a real one that is bound to vfio-pci. Exit status: 0 well, 1 data differ or an I/O
failed, 2 bad input or a controller that cannot be had.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmakit.units import parse_size

if TYPE_CHECKING:
    from dmakit.nvme.controller import Controller

HELP = "drive an NVMe controller: list, identify, read, write, verify every byte, measure"
STRATEGIES = ("auto", "premap", "two-step", "page", "sg")
DESTRUCTIVE = ("write", "verify")


def _size(text: str) -> int:
    from dmakit.errors import InputError

    try:
        return parse_size(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", default="soft", metavar="soft|vfio:BDF", help="where the controller is")
    parser.add_argument(
        "--soft", action="store_const", const="soft", dest="platform", help="the same as --platform soft"
    )
    parser.add_argument("--backend", choices=("auto", "type1", "iommufd"), default="auto", help="VFIO interface")
    parser.add_argument("--poll", action="store_true", help="poll instead of waiting for interrupts")
    parser.add_argument("--queues", type=int, default=1, help="I/O queue pairs (default: 1)")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, help="how memory is mapped (default: auto, on the software machine premap)"
    )
    parser.add_argument("--no-sgl", action="store_true", help="PRPs only")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="seconds for a command (default: 30)")
    parser.add_argument("--json", metavar="PATH|-", help="write the result as JSON to a file, or - for standard output")


def _place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nsid", type=int, default=1, help="namespace (default: 1)")
    parser.add_argument("--lba", type=int, default=0, help="first block (default: 0)")


def configure(parser: argparse.ArgumentParser) -> None:
    """The actions and their arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    made = {}
    for name, text in {
        "list": "the NVMe controllers of this machine, and who drives them",
        "identify": "what a controller says of itself and of its namespaces",
        "read": "read blocks to a file or to standard output",
        "write": "write a file to blocks (destroys what is there: --yes)",
        "verify": "write random data, read it back, compare every byte (destroys what is there: --yes)",
        "perf": "measure random I/O: rate, latency, software time an I/O",
    }.items():
        made[name] = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _common(made[name])
    for name in ("read", "write", "verify", "perf"):
        _place(made[name])
    for name in (*DESTRUCTIVE, "perf"):
        made[name].add_argument("--yes", action="store_true", help="I know that this destroys data")
    made["read"].add_argument("--blocks", type=int, default=1, help="how many (default: 1)")
    made["read"].add_argument("--out", type=Path, metavar="FILE", help="where to (default: standard output)")
    made["write"].add_argument("input", metavar="FILE", help="what to write (- is standard input); padded to a block")
    verify = made["verify"]
    verify.add_argument("--size", type=_size, default=64 << 20, help="bytes to write and compare (default: 64M)")
    verify.add_argument("--max-io", type=_size, default=512 << 10, help="largest transfer (default: 512K)")
    verify.add_argument(
        "--no-write",
        action="store_true",
        help="only read: compare with what a verify with the same --size, --lba, --max-io and --seed wrote before",
    )
    verify.add_argument("--seed", type=int, default=0, help="seed of data, sizes, order, memory (default: 0)")
    perf = made["perf"]
    perf.add_argument("--op", choices=("read", "write"), default="read", help="default: read")
    perf.add_argument("--bs", type=_size, default=4096, help="bytes a transfer, at most 8K (default: 4K)")
    perf.add_argument("--seconds", type=float, default=2.0, help="how long (default: 2)")
    for name in ("verify", "perf"):
        made[name].add_argument("--depth", type=int, default=32, help="commands in flight (default: 32)")


def run(args: argparse.Namespace) -> int:
    """Open the controller and do it."""
    from dmakit.cli.output import check_json

    check_json(args.json)
    if args.action == "list":
        return _list(args)
    _check(args)
    with _open(args) as controller:
        action = {"identify": _identify, "read": _read, "write": _write, "verify": _verify, "perf": _perf}[args.action]
        return action(controller, args)


def _check(args: argparse.Namespace) -> None:
    from dmakit.errors import InputError

    destroys = args.action in DESTRUCTIVE or (args.action == "perf" and args.op == "write")
    destroys = destroys and not getattr(args, "no_write", False)
    if destroys and not args.yes:
        raise InputError(f"nvme {args.action} overwrites {args.platform}, namespace {args.nsid}: say --yes to do it")
    if args.action == "perf" and args.strategy not in (None, "auto", "premap"):
        raise InputError(f"nvme perf --strategy {args.strategy}: it works on registered memory: auto or premap")
    if args.queues < 1 or getattr(args, "depth", 1) < 1 or not args.timeout > 0:
        raise InputError("--queues, --depth and --timeout: must be above 0")


def _open(args: argparse.Namespace) -> Controller:
    from dmakit.errors import InputError
    from dmakit.nvme.controller import Controller

    where, _, bdf = args.platform.partition(":")
    options: dict[str, Any] = {
        "queues": args.queues + (args.action == "perf"),
        "depth": max(128, getattr(args, "depth", 1)),
        "strategy": args.strategy,
        "use_sgl": not args.no_sgl,
        "timeout": args.timeout,
    }
    if where == "soft" and not bdf:
        return Controller.open("soft", **options)
    if where != "vfio" or not bdf:
        raise InputError(f"--platform {args.platform}: must be soft or vfio:BDF (vfio:0000:01:00.0)")
    return Controller.open(bdf, backend=args.backend, interrupts=not args.poll, **options)


def _space(controller: Controller, args: argparse.Namespace) -> Any:
    from dmakit.errors import InputError

    if args.nsid not in controller.namespaces:
        raise InputError(f"--nsid {args.nsid}: active are {', '.join(map(str, controller.namespaces)) or 'none'}")
    return controller.namespaces[args.nsid]


def _report(args: argparse.Namespace, document: dict[str, Any], lines: list[str]) -> None:
    from dmakit.cli.output import write_json

    if args.json != "-":
        print("\n".join(lines))
    if args.json is not None:
        write_json(document, args.json)


def _identity(controller: Controller) -> dict[str, Any]:
    facts = controller.facts
    return {
        "controller": controller.name,
        "model": facts.model,
        "serial": facts.serial,
        "firmware": facts.firmware,
        "vendor": f"{facts.vendor:04x}",
        "max_transfer": facts.max_transfer,
        "queues": controller.queues,
        "sgls": f"{facts.sgls:#x}",
        "commands": [
            name
            for name, has in (
                ("compare", facts.compare),
                ("write zeroes", facts.write_zeroes),
                ("deallocate", facts.deallocate),
            )
            if has
        ],
        "volatile_cache": facts.volatile_cache,
        "registers": controller.state,
        "namespaces": [
            {
                "nsid": space.nsid,
                "blocks": space.blocks,
                "block_size": space.block_size,
                "metadata_size": space.facts.metadata_size,
                "bytes": space.blocks * space.block_size,
            }
            for space in controller.namespaces.values()
        ],
    }


def _identify(controller: Controller, args: argparse.Namespace) -> int:
    document = _identity(controller)
    lines = [f"{name:<16}{value if not isinstance(value, list) else ', '.join(value)}"
             for name, value in document.items() if name != "namespaces"]  # fmt: skip
    for space in document["namespaces"]:
        lines.append(
            f"namespace {space['nsid']:<6}{space['blocks']} blocks of {space['block_size']} bytes, "
            f"{space['bytes'] / (1 << 20):.1f} MiB"
            + (f", {space['metadata_size']} bytes of metadata a block" if space["metadata_size"] else "")
        )
    _report(args, document, lines)
    return 0


def _list(args: argparse.Namespace) -> int:
    """The software machine's controller, and what sysfs shows of class 0x0108."""
    from dmakit.nvme.discover import controllers

    found = controllers()
    lines = [f"{'address':<14}{'id':<11}{'driver':<11}{'group':>5}  how to open it"]
    lines += [f"{c.bdf:<14}{c.ids:<11}{c.driver or '-':<11}{c.group:>5}  {c.how}" for c in found]
    lines.append(f"{'soft':<14}{'-':<11}{'dmakit':<11}{'-':>5}  --platform soft")
    _report(args, {"controllers": [c.as_json() for c in found]}, lines)
    return 0


def _read(controller: Controller, args: argparse.Namespace) -> int:
    space = _space(controller, args)
    payload = space.read(args.lba, args.blocks)
    if args.out is not None:
        args.out.write_bytes(payload)
        text = f"{len(payload)} bytes from block {args.lba} written to {args.out}"
        _report(args, {"bytes": len(payload), "file": str(args.out)}, [text])
    elif args.json is None:
        sys.stdout.buffer.write(payload)
        sys.stdout.buffer.flush()
    else:
        _report(args, {"bytes": len(payload), "data": payload.hex()}, [payload.hex()])
    return 0


def _write(controller: Controller, args: argparse.Namespace) -> int:
    from dmakit.errors import InputError

    space = _space(controller, args)
    payload = sys.stdin.buffer.read() if args.input == "-" else Path(args.input).read_bytes()
    if not payload:
        raise InputError(f"{args.input}: is empty, there is nothing to write")
    padded = payload.ljust(-(-len(payload) // space.block_size) * space.block_size, b"\0")
    space.write(args.lba, padded)
    space.flush()
    text = f"{len(padded)} bytes written from block {args.lba} of namespace {args.nsid}, flushed"
    _report(args, {"bytes": len(padded), "lba": args.lba, "padding": len(padded) - len(payload)}, [text])
    return 0


def _verify(controller: Controller, args: argparse.Namespace) -> int:
    from dmakit.cli.labargs import progress
    from dmakit.nvme.auto import AutoMapper
    from dmakit.nvme.exercise import Verifier

    _space(controller, args)
    report = Verifier(
        controller,
        args.nsid,
        total=args.size,
        first=args.lba,
        depth=args.depth,
        seed=args.seed,
        max_io=args.max_io,
        progress=progress(unit="bytes"),
    ).run(write=not args.no_write)
    wrote = f"{report.bytes_written} bytes written from block {report.first_lba} (what was there is gone), "
    lines = [
        f"{report.controller}, namespace {report.nsid}: {'' if args.no_write else wrote}"
        f"{report.bytes_compared} {'bytes of an earlier run read' if args.no_write else 'read back'} and compared",
        f"{report.extents} extents, {report.commands} commands ({report.prp_commands} PRP, {report.sgl_commands} SGL), "
        f"up to {report.max_in_flight} in flight, strategy {report.strategy}, seed {report.seed}, "
        f"{report.resets} resets",
    ]
    if isinstance(controller.driver.mapper, AutoMapper):
        lines += controller.driver.mapper.lines()
    lines += report.failed[:10]
    lines += [
        f"block {m.lba}, byte {m.offset}: {m.found:#04x} instead of {m.expected:#04x}" for m in report.mismatches[:10]
    ]
    lines.append("every byte is right" if report.good else f"WRONG: {len(report.mismatches)} extents differ, "
                 f"{len(report.failed)} commands failed")  # fmt: skip
    _report(args, report.as_json(), lines)
    return 0 if report.good else 1


def _perf(controller: Controller, args: argparse.Namespace) -> int:
    from dmakit.cli.labargs import progress
    from dmakit.nvme.exercise import perf

    _space(controller, args)
    found = perf(
        controller,
        args.nsid,
        op=args.op,
        size=args.bs,
        depth=args.depth,
        seconds=args.seconds,
        progress=progress(unit="ms"),
    )
    us = 1000
    lines = [
        f"{found.controller}, namespace {found.nsid}: random {found.op} of {found.block_bytes} bytes, "
        f"{found.depth} in flight, {found.seconds:.2f} s",
        f"{found.iops:,.0f} I/O a second, {found.bytes_per_second / 1e6:,.1f} MB/s, {found.errors} errors",
        f"latency: mean {found.latency_mean / us:,.1f} us, median {found.latency_p50 / us:,.1f} us, "
        f"99 % {found.latency_p99 / us:,.1f} us, worst {found.latency_max / us:,.1f} us",
        f"software: {found.software_ns:,.0f} ns of processor time an I/O in submit and complete",
        f"memory registered from the start ({found.strategy}): a batch asks for its addresses",
    ]
    if found.verdict:
        lines.append(f"request by request: {found.verdict}")
    _report(args, found.as_json(), lines)
    return 1 if found.errors else 0

"""``dmakit vfio list|bind|unbind``: which PCI devices this host has, and whose they are.

``list`` only reads. ``bind`` takes a device from its driver for VFIO and says which driver that was; ``unbind`` gives
it back. Both need root. Exit status 2, one line, when a device is in use (mounted, held by a process) or something is
missing.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

HELP = "list PCI devices and their IOMMU groups; bind one to VFIO or give it back"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    shown = actions.add_parser("list", help="every PCI device: class, ids, driver, group, and what hangs on it")
    shown.add_argument("--json", metavar="PATH|-", help="write the list as JSON to a file, or - for standard output")
    bind = actions.add_parser("bind", help="take a device from its driver for vfio-pci; refused while it is in use")
    unbind = actions.add_parser("unbind", help="give it back to the driver that bind took it from; refused while held")
    for action in (bind, unbind):
        action.add_argument("bdf", metavar="BDF", help="PCI address, as in 0000:01:00.0")
    unbind.add_argument(
        "--wait",
        action="store_true",
        help="where a process holds the device, ask it and wait until it is closed; no signal ends this waiting",
    )


def run(args: argparse.Namespace) -> int:
    """List, bind or unbind."""
    from dmakit.platform.linux import binding, pci
    from dmakit.platform.linux.holders import holders, open_nodes
    from dmakit.platform.linux.kernel import Kernel

    kernel = Kernel()
    if args.action == "list":
        return show(kernel, args.json)
    before = pci.find(kernel, args.bdf)
    if args.action == "bind":
        after = binding.bind(kernel, args.bdf)
    else:
        if args.wait and (held := holders(before, open_nodes(kernel))):
            print(f"dmakit: {before.bdf} {'; '.join(held)}: waiting until it is closed", file=sys.stderr, flush=True)
        after = binding.unbind(kernel, args.bdf, wait=args.wait)
    if before.driver == after.driver:
        print(f"{after.bdf}: bound to {after.driver or 'no driver'} already")
    else:
        print(f"{after.bdf}: {before.driver or 'no driver'} -> {after.driver or 'no driver'}")
    return 0


def facts(kernel: Any) -> list[dict[str, Any]]:
    """Every device with its uses and with what keeps its group from being given out."""
    from dmakit.platform.linux import binding, pci
    from dmakit.platform.linux.holders import holders, open_nodes

    found, nodes = pci.scan(kernel), open_nodes(kernel)
    return [
        {
            **device.as_json(),
            "uses": binding.uses(kernel, device.bdf) + holders(device, nodes),
            "group_held_by": [other.bdf for other in pci.strangers(kernel, device)],
        }
        for device in found
    ]


def show(kernel: Any, where: str | None) -> int:
    """The table for the eye, or JSON."""
    from dmakit.cli.output import check_json, write_json

    check_json(where)
    rows = facts(kernel)
    if where != "-":
        print(f"{'device':<13} {'class':<13} {'ids':<10} {'group':>5} {'driver':<12} notes")
    for row in rows if where != "-" else ():
        notes = [*row["uses"]]
        if row["group_held_by"]:
            notes.append(f"group shared with {', '.join(row['group_held_by'])}")
        ids = f"{row['vendor']:04x}:{row['device']:04x}"
        group = "-" if row["group"] is None else row["group"]
        line = f"{row['bdf']:<13} {row['kind']:<13} {ids:<10} {group:>5} {row['driver'] or '-':<12} {'; '.join(notes)}"
        print(line.rstrip())
    if where is not None:
        write_json(rows, where)
    if where != "-" and rows and all(row["group"] is None for row in rows):
        print("no device is behind an IOMMU: enable it in the firmware, or boot with intel_iommu=on (Intel)")
    return 0

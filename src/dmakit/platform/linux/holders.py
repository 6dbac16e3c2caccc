"""Who holds a VFIO device: the processes that have its node, or the node of its group, open.

The kernel takes no device from such a process: whoever asks (unbind, remove, an unplugged card) waits until the process
has closed it, and cannot be interrupted meanwhile. So it is worth knowing before. A process that holds the group is
named although it may use another device of that group: the group is one for the IOMMU, and type1 gives it out whole.

Read from ``/proc/PID/fd``, and no further than the links: what one points to may lie on a server that does not answer.
Another user's processes show theirs to root only (and not to every root, in a container), and processes of another PID
namespace are not seen.
"""

from __future__ import annotations

from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.pci import PciDevice

_NODES = "/dev/vfio/"


def open_nodes(kernel: Kernel) -> dict[str, list[str]]:
    """The processes, in words, that have a node below ``/dev/vfio`` open, by node."""
    found: dict[str, list[str]] = {}
    for pid in filter(str.isdigit, kernel.names("/proc")):
        files = {kernel.target(f"/proc/{pid}/fd/{fd}") for fd in kernel.names(f"/proc/{pid}/fd")}
        for node in sorted(file for file in files if file.startswith(_NODES)):
            found.setdefault(node, []).append(f"process {pid} ({kernel.text(f'/proc/{pid}/comm') or 'gone'})")
    return found


def holders(device: PciDevice, nodes: dict[str, list[str]]) -> list[str]:
    """Those of ``open_nodes`` that hold this device, in words."""
    own = nodes.get(device.cdev, [])
    group = [] if device.group is None else nodes.get(f"{_NODES}{device.group}", [])
    return [f"is held by {who}" for who in own] + [f"its group {device.group} is held by {who}" for who in group]

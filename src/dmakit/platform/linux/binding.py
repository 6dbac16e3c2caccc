"""Taking a PCI device from its driver for VFIO, and giving it back: explicit, reversible, refused while in use.

``bind`` looks first at what hangs on the device: file systems mounted from its disks (partitions, and whatever device
mapper or md stack upon them, included), swap, network interfaces that are up. Then it *claims* the disks: it opens them
exclusively (``O_EXCL``), which Linux refuses while anything else, mounted in another namespace or not at all, holds
the disk or a partition of it so (``bd_may_claim`` in ``block/bdev.c``). Any of it, and nothing changes. Otherwise it
sets ``driver_override`` to vfio-pci, unbinds the driver, gives the claims back (nobody could mount a disk until then),
probes, and notes the old driver under ``/run/dmakit``, so that ``unbind`` (by any process, until the next boot)
restores exactly that.

A device's disks and interfaces are those whose real place in sysfs is below it, whatever lies between. A namespace
with several *paths* has a hidden disk per path (``nvme3c0n1``) below its controllers and a *head* (``nvme3n1``)
below no controller: the head is what gets used. btrfs mounts under a device number of its own: a mount's source counts
as well as its number. Not seen: programs that merely have a disk open, and disks whose node this process may not open
or does not have (in a container), as far as they are not in its own list of mounts.

``unbind`` looks whether a process holds the device (``holders``): the kernel would wait for it, without an end.

If probing fails half-way the old driver is put back at once. Source: ``Documentation/ABI/testing/sysfs-bus-pci``.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import ExitStack

from dmakit.errors import DmakitError, HostError
from dmakit.platform.linux import pci
from dmakit.platform.linux.holders import holders, open_nodes
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.pci import PciDevice

NOTES = "/run/dmakit/vfio"
_BLOCK = "/sys/class/block"
_NVME_PATH = re.compile(r"(nvme\d+)c\d+(n\d+)")
_IFF_UP = 1
_EXCLUSIVE = os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK  # a drive without a medium need not look for one
_NO_ANSWER = (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM, errno.EACCES, errno.EPERM)


def _below(kernel: Kernel, kind: str, bdf: str) -> list[str]:
    """The names of a class's devices (``block``, ``net``) that lie below a PCI device."""
    folder = f"/sys/class/{kind}"
    return [name for name in kernel.names(folder) if f"/{bdf}/" in kernel.real(f"{folder}/{name}")]


def _disks(kernel: Kernel, bdf: str) -> list[str]:
    """The whole disks of a PCI device; of an NVMe path its head."""
    found = _below(kernel, "block", bdf)
    return sorted({_NVME_PATH.sub(r"\1\2", name) for name in found if not kernel.exists(f"{_BLOCK}/{name}/partition")})


def _partitions(kernel: Kernel, disk: str) -> list[str]:
    return [name for name in kernel.names(f"{_BLOCK}/{disk}") if kernel.exists(f"{_BLOCK}/{disk}/{name}/partition")]


def _used(kernel: Kernel) -> dict[str, str]:
    """What is mounted or swap, in words, by block device: major:minor, or its name where it has no node in /dev."""
    found: dict[str, str] = {}

    def note(source: str, how: str) -> None:
        if source.startswith("/dev/"):
            found.setdefault(kernel.device_number(source) or source.rsplit("/", 1)[-1], how)

    for line in (kernel.text("/proc/self/mountinfo") or "").splitlines():
        mount, _, origin = line.partition(" - ")
        number, where = mount.split()[2], mount.split()[4]
        found.setdefault(number, f"is mounted at {where}")
        note(origin.split()[1], f"is mounted at {where}")
    for line in (kernel.text("/proc/swaps") or "").splitlines()[1:]:
        note(line.split()[0], "is swap")
    return found


def _uses_of(kernel: Kernel, name: str, used: dict[str, str]) -> list[str]:
    """What is done with a block device, with its partitions, and with whatever is stacked upon them."""
    how = used.get(kernel.text(f"{_BLOCK}/{name}/dev") or "") or used.get(name)
    found = [f"{name} {how}"] if how else []
    for part in _partitions(kernel, name):
        found += _uses_of(kernel, part, used)
    for holder in kernel.names(f"{_BLOCK}/{name}/holders"):
        found += _uses_of(kernel, holder, used) or [f"{name} is held by {holder}"]
    return found


def uses(kernel: Kernel, bdf: str) -> list[str]:
    """What hangs on a device, in words; empty when nothing does as far as reading tells (``bind`` also claims)."""
    used = _used(kernel)
    found = [use for disk in _disks(kernel, bdf) for use in _uses_of(kernel, disk, used)]
    for name in _below(kernel, "net", bdf):
        if int(kernel.text(f"/sys/class/net/{name}/flags") or "0", 0) & _IFF_UP:
            found.append(f"network interface {name} is up")
    return list(dict.fromkeys(found))


def _claim(kernel: Kernel, name: str, claims: ExitStack) -> bool:
    """Hold a disk or partition exclusively until ``claims`` closes; False when somebody else holds it so.

    True as well when its node gives no answer, not being there or not ours to open; HostError on any other error.
    """
    try:
        claims.callback(kernel.close, kernel.open(f"/dev/{name.replace('!', '/')}", _EXCLUSIVE))
    except HostError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno not in _NO_ANSWER:
            raise
    return True


def _claim_all(kernel: Kernel, bdf: str, claims: ExitStack) -> list[str]:
    """Claim a device's disks; who is held by somebody else, in words.

    A disk is refused when one of its partitions is held, and all of its partitions when the disk is: the partitions
    are named when some can be had.
    """
    found = []
    for disk in _disks(kernel, bdf):
        if not _claim(kernel, disk, claims):
            with ExitStack() as tries:
                parts = _partitions(kernel, disk)
                held = [part for part in parts if not _claim(kernel, part, tries)]
            found += held if len(held) < len(parts) and held else [disk]
    return [f"{name} is held open exclusively" for name in found]


def bind(kernel: Kernel, bdf: str) -> PciDevice:
    """Give ``bdf`` to vfio-pci; HostError (EBUSY) naming what uses it. Nothing happens when it is bound already."""
    found = pci.find(kernel, bdf)
    if found.driver == pci.VFIO_DRIVER:
        return found
    if found.group is None:
        pci.check_ready(kernel, found)
    with ExitStack() as claims:
        busy = uses(kernel, found.bdf) or _claim_all(kernel, found.bdf, claims)
        if busy:
            raise HostError(f"{found.bdf} is in use: {'; '.join(busy)}", errno.EBUSY)
        _need_driver(kernel)
        _hand_over(kernel, found, claims)
    after = pci.find(kernel, found.bdf)
    if after.driver != pci.VFIO_DRIVER:
        _restore(kernel, found.bdf)
        raise HostError(
            f"{found.bdf}: vfio-pci did not take the device (see dmesg); {found.driver or 'no driver'} is back"
        )
    return after


def _need_driver(kernel: Kernel) -> None:
    """Load vfio-pci unless it is there."""
    path = f"{pci.DRIVERS}/{pci.VFIO_DRIVER}"
    if not kernel.exists(path):
        kernel.load_module(pci.VFIO_DRIVER)
    if not kernel.exists(path):
        raise HostError("this kernel has no vfio-pci driver: modprobe vfio-pci (as root), or build it in", errno.ENODEV)


def _hand_over(kernel: Kernel, found: PciDevice, claims: ExitStack) -> None:
    """From its driver to vfio-pci, all noted; on an error the old driver is back.

    The claims end with the driver: a disk that is held keeps its name, and the next one would get another.
    """
    path = f"{pci.DEVICES}/{found.bdf}"
    override = kernel.text(f"{path}/driver_override") or ""
    kernel.remember(f"{NOTES}/{found.bdf}", f"{found.driver}\n{'' if override == '(null)' else override}\n")
    try:
        with claims:
            kernel.store(f"{path}/driver_override", pci.VFIO_DRIVER)
            if found.driver:
                kernel.store(f"{path}/driver/unbind", found.bdf)
        kernel.store("/sys/bus/pci/drivers_probe", found.bdf)
    except DmakitError:
        _restore(kernel, found.bdf)
        raise


def unbind(kernel: Kernel, bdf: str, *, wait: bool = False) -> PciDevice:
    """Take ``bdf`` from vfio-pci and give it back to the driver that ``bind`` noted (else to whoever wants it).

    HostError (EBUSY) naming the process that holds it; with ``wait`` the kernel asks that process for it instead, and
    this call lasts until it has closed it. HostError (EINVAL) for a device of another driver.
    """
    found = pci.find(kernel, bdf)
    if found.driver not in (pci.VFIO_DRIVER, ""):
        raise HostError(f"{found.bdf} is not bound to vfio-pci but to {found.driver}", errno.EINVAL)
    held = [] if wait or not found.driver else holders(found, open_nodes(kernel))
    if held:
        raise HostError(
            f"{found.bdf} {'; '.join(held)}: end it, or have the kernel ask for the device and wait until it is closed "
            "(unbind --wait)",
            errno.EBUSY,
        )
    _restore(kernel, found.bdf, quiet=False)
    return pci.find(kernel, found.bdf)


def _restore(kernel: Kernel, bdf: str, *, quiet: bool = True) -> None:
    """Driver and driver_override as they were noted; ``quiet``: as far as it goes (an error is on its way already)."""
    path = f"{pci.DEVICES}/{bdf}"
    driver, override = ((kernel.text(f"{NOTES}/{bdf}") or "") + "\n\n").split("\n")[:2]
    steps = [(f"{path}/driver_override", override or "\n")]
    now = kernel.link(f"{path}/driver")
    if now and now != driver:
        steps.append((f"{path}/driver/unbind", bdf))
    if now != driver or not driver:
        steps.append((f"{pci.DRIVERS}/{driver}/bind" if driver else "/sys/bus/pci/drivers_probe", bdf))
    for where, text in steps:
        try:
            kernel.store(where, text)
        except DmakitError:
            if not quiet:
                raise
    kernel.forget(f"{NOTES}/{bdf}")

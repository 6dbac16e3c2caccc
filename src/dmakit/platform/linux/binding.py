"""Taking a PCI device from its driver for VFIO, and giving it back: explicit, reversible, refused while in use.

``bind`` looks first at what hangs on the device: file systems mounted from its disks (partitions and device mapper on
top included), swap, disks that something holds open exclusively, network interfaces that are up. Any of it, and
nothing changes. Otherwise it sets ``driver_override`` to vfio-pci, unbinds the driver, probes, and notes the old
driver under ``/run/dmakit``, so that ``unbind`` (by any process, until the next boot) restores exactly that.

If probing fails half-way the old driver is put back at once. Source: ``Documentation/ABI/testing/sysfs-bus-pci``.
"""

from __future__ import annotations

from collections.abc import Iterator

from dmakit.errors import DmakitError, HostError
from dmakit.platform.linux import pci
from dmakit.platform.linux.kernel import Kernel

NOTES = "/run/dmakit/vfio"
_IFF_UP = 1


def _walk(kernel: Kernel, path: str, kinds: tuple[str, ...], depth: int = 8) -> Iterator[tuple[str, str]]:
    """(kind, path) of each class directory of a device and of the devices below it."""
    for name in kernel.names(path):
        below = f"{path}/{name}"
        if name in kinds:
            yield from ((name, f"{below}/{entry}") for entry in kernel.names(below))
        elif depth and kernel.names(below) and not kernel.link(below):
            yield from _walk(kernel, below, kinds, depth - 1)


def _mounts(kernel: Kernel) -> dict[str, str]:
    """major:minor to mount point."""
    rows = [line.split() for line in (kernel.text("/proc/self/mountinfo") or "").splitlines()]
    return {row[2]: row[4] for row in rows if len(row) > 4}


def _disks(kernel: Kernel, path: str) -> Iterator[str]:
    """A block device's directory, its partitions, and whatever is stacked upon them."""
    yield path
    for name in kernel.names(path):
        if kernel.exists(f"{path}/{name}/partition"):
            yield from _disks(kernel, f"{path}/{name}")
    for holder in kernel.names(f"{path}/holders"):
        yield from _disks(kernel, f"/sys/class/block/{holder}")


def uses(kernel: Kernel, bdf: str) -> list[str]:
    """What hangs on a device, in words; empty when it may be taken away."""
    found: list[str] = []
    mounts = _mounts(kernel)
    swaps = {line.split()[0].rsplit("/", 1)[-1] for line in (kernel.text("/proc/swaps") or "").splitlines()[1:]}
    for kind, path in _walk(kernel, f"{pci.DEVICES}/{bdf}", ("block", "net")):
        name = path.rsplit("/", 1)[-1]
        if kind == "net":
            if int(kernel.text(f"{path}/flags") or "0", 0) & _IFF_UP:
                found.append(f"network interface {name} is up")
            continue
        for disk in _disks(kernel, path):
            part = disk.rsplit("/", 1)[-1]
            where = mounts.get(kernel.text(f"{disk}/dev") or "")
            if where is not None:
                found.append(f"{part} is mounted at {where}")
            if part in swaps:
                found.append(f"{part} is swap")
    return found


def bind(kernel: Kernel, bdf: str) -> pci.PciDevice:
    """Give ``bdf`` to vfio-pci; HostError (EBUSY) naming what uses it. Nothing happens when it is bound already."""
    found = pci.find(kernel, bdf)
    if found.driver == pci.VFIO_DRIVER:
        return found
    if found.group is None:
        pci.check_ready(kernel, found)
    busy = uses(kernel, found.bdf)
    if busy:
        raise HostError(f"{found.bdf} is in use: {'; '.join(busy)}", 16)
    if not kernel.exists(f"{pci.DRIVERS}/{pci.VFIO_DRIVER}"):
        kernel.load_module(pci.VFIO_DRIVER)
        if not kernel.exists(f"{pci.DRIVERS}/{pci.VFIO_DRIVER}"):
            raise HostError("this kernel has no vfio-pci driver: modprobe vfio-pci (as root), or build it in", 19)
    path = f"{pci.DEVICES}/{found.bdf}"
    override = kernel.text(f"{path}/driver_override") or ""
    kernel.remember(f"{NOTES}/{found.bdf}", f"{found.driver}\n{'' if override == '(null)' else override}\n")
    try:
        kernel.store(f"{path}/driver_override", pci.VFIO_DRIVER)
        if found.driver:
            kernel.store(f"{path}/driver/unbind", found.bdf)
        kernel.store("/sys/bus/pci/drivers_probe", found.bdf)
    except DmakitError:
        _restore(kernel, found.bdf)
        raise
    after = pci.find(kernel, found.bdf)
    if after.driver != pci.VFIO_DRIVER:
        _restore(kernel, found.bdf)
        raise HostError(
            f"{found.bdf}: vfio-pci did not take the device (see dmesg); {found.driver or 'no driver'} is back"
        )
    return after


def unbind(kernel: Kernel, bdf: str) -> pci.PciDevice:
    """Take ``bdf`` from vfio-pci and give it back to the driver that ``bind`` noted (else to whoever wants it)."""
    found = pci.find(kernel, bdf)
    if found.driver not in (pci.VFIO_DRIVER, ""):
        raise HostError(f"{found.bdf} is not bound to vfio-pci but to {found.driver}", 22)
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

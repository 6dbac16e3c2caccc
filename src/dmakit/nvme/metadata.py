"""Metadata of a request: one address in MPTR, or an SGL of its own.

One integrity segment of ordinary memory is mapped alone and its address goes to MPTR; its length is implied by the
namespace's format. Several segments, a user command (whose length must be explicit) or peer memory go through the
iterator and, if they do not become one range of a kernel command, into a 256-byte list block: its first descriptor
points to the others, so at most 15 segments fit.

A window is decided by the integrity segments' own gaps.

Models ``drivers/nvme/host/pci.c``: ``nvme_map_metadata``, ``nvme_pci_setup_meta_mptr``, ``nvme_pci_setup_meta_iter``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmakit.block.dma_iter import BlkDmaIter, unmap
from dmakit.block.status import BlkStatus
from dmakit.consts import (
    ATTR_MMIO,
    IOD_META_MAPPED,
    IOD_SINGLE_META_SEGMENT,
    P2P_MAP_NONE,
    P2P_MAP_THRU_HOST_BRIDGE,
    PATH_FAILED,
    PSDT_SGL_METABUF,
    PSDT_SGL_METASEG,
)
from dmakit.errors import DmakitError
from dmakit.nvme.spec import SGL_BYTES
from dmakit.reasons import Reason

if TYPE_CHECKING:
    from dmakit.block.request import Request
    from dmakit.nvme.iod import Iod
    from dmakit.nvme.mapping import RequestMapper

_LAST_SEGMENT = 3 << 60


def wants_sgl(mapper: RequestMapper, iod: Iod, request: Request) -> bool:
    """Whether metadata needs more than MPTR (``nvme_pci_metadata_use_sgls``); only beside an SGL for the data."""
    if iod.psdt != PSDT_SGL_METABUF or not mapper.meta_sgl_supported:
        return False
    return request.integrity.segments > 1 or request.user_command


def map_metadata(mapper: RequestMapper, iod: Iod, request: Request) -> int:
    """Map the integrity payload; returns the status. On failure nothing of the metadata stays mapped."""
    peer = mapper.peer
    is_peer = False
    if peer is not None:
        peer.reset()
        is_peer = peer.map_type(request.integrity.phys[0]) != P2P_MAP_NONE
    if is_peer or wants_sgl(mapper, iod, request):
        return _through_iterator(mapper, iod, request)
    if request.integrity.count > 1:
        return _fail(iod, int(BlkStatus.IOERR), int(Reason.MALFORMED_SEGMENTS), None)
    phys, length = request.integrity.phys[0], request.integrity.length[0]
    try:
        iod.mptr = mapper.device.map_phys(phys, length, request.direction, 0, cpu=iod.cpu)
    except DmakitError as error:
        return _fail(iod, int(BlkStatus.IOERR), mapper.device.why, error)
    iod.meta_total = length
    iod.meta_entries = 1
    iod.flags |= IOD_SINGLE_META_SEGMENT | IOD_META_MAPPED
    return 0


def _fail(iod: Iod, status: int, reason: int, error: Exception | None) -> int:
    iod.status, iod.reason, iod.error, iod.path = status, reason, error, PATH_FAILED
    return status


def _through_iterator(mapper: RequestMapper, iod: Iod, request: Request) -> int:
    """Map by the iterator; MPTR holds the only range, or points to a list block."""
    walk = BlkDmaIter()
    if not walk.start(request, mapper.device, integrity=True, rule=mapper.rule, peer=mapper.peer, cpu=iod.cpu):
        return _fail(iod, walk.status, walk.reason, walk.error)
    iod.meta_state, iod.meta_map_type = walk.state, walk.map_type
    iod.flags |= IOD_META_MAPPED
    single = walk.state is not None or request.integrity.segments == 1
    iod.mptr, iod.meta_total, iod.meta_entries = walk.addr, walk.len, 1
    if single and not request.user_command:
        return 0
    try:
        block = mapper.small.alloc()
    except DmakitError as error:
        unmap_metadata(mapper, iod, iod.cpu)
        return _fail(iod, int(BlkStatus.RESOURCE), int(Reason.DESCRIPTORS_EXHAUSTED), error)
    iod.meta_block, iod.psdt = block, PSDT_SGL_METASEG
    iod.mptr = block.addr
    if single:
        block.words[0], block.words[1] = walk.addr, walk.len
        return 0
    iod.meta_entries = 0
    more = True
    while more:
        slot = 2 * (iod.meta_entries + 1)
        block.words[slot], block.words[slot + 1] = walk.addr, walk.len
        iod.meta_entries += 1
        iod.meta_total = walk.mapped
        more = walk.next()
    block.words[0], block.words[1] = block.addr + SGL_BYTES, _LAST_SEGMENT | SGL_BYTES * iod.meta_entries
    if walk.status:
        unmap_metadata(mapper, iod, iod.cpu)
        return _fail(iod, walk.status, mapper.device.why, walk.error)
    return 0


def unmap_metadata(mapper: RequestMapper, iod: Iod, cpu: int) -> None:
    """Undo ``map_metadata``; harmless when nothing is mapped."""
    if not iod.flags & IOD_META_MAPPED:
        return
    direction = iod.direction
    attrs = ATTR_MMIO if iod.meta_map_type == P2P_MAP_THRU_HOST_BRIDGE else 0
    if iod.flags & IOD_SINGLE_META_SEGMENT:
        mapper.device.unmap_phys(iod.mptr, iod.meta_total, direction, 0, cpu=cpu)
    elif not unmap(mapper.device, iod.meta_state, iod.meta_total, direction, iod.meta_map_type, cpu=cpu):
        for addr, length in _ranges(iod):
            mapper.device.unmap_phys(addr, length, direction, attrs, cpu=cpu)
    if iod.meta_block is not None:
        mapper.small.release(iod.meta_block)
    iod.meta_block = iod.meta_state = None
    iod.flags &= ~(IOD_META_MAPPED | IOD_SINGLE_META_SEGMENT)


def _ranges(iod: Iod) -> list[tuple[int, int]]:
    """The metadata ranges, from what the command says."""
    block = iod.meta_block
    if block is None:
        return [(iod.mptr, iod.meta_total)]
    if block.words[1] >> 56 == 0:
        return [(block.words[0], block.words[1])]
    return [(block.words[2 * at], block.words[2 * at + 1]) for at in range(1, iod.meta_entries + 1)]

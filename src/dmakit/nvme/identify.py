"""The data structures that the controller model returns: Identify Controller, Identify Namespace, the namespace list,
and the SMART log; and the few fields of them that the driver reads.

Offsets are those of the figures "Identify Controller Data Structure" and "Identify Namespace Data Structure". Fields
that are not set here are zero, which the specification allows for everything this controller lacks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmakit.errors import UnsupportedError
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.spec import IDENTIFY_BYTES, PAGE

if TYPE_CHECKING:
    from dmakit.nvme.nvm import Counters

VERSION = 0x0001_0400
ONCS_DSM = 1 << 2
ONCS_WRITE_ZEROES = 1 << 3
ONCS_COMPARE = 1 << 0
ABORT_LIMIT = 3  # 0-based
EVENT_LIMIT = 3  # 0-based


@dataclass(frozen=True, slots=True)
class ControllerFacts:
    """What a driver needs from Identify Controller; ``max_transfer`` in bytes, 0 = no limit; ``vendor``: PCI id."""

    vendor: int
    serial: str
    model: str
    firmware: str
    max_transfer: int
    namespaces: int
    sgls: int
    write_zeroes: bool
    deallocate: bool
    compare: bool
    volatile_cache: bool

    @classmethod
    def parse(cls, raw: bytes) -> ControllerFacts:
        """From the 4096 bytes."""
        mdts = raw[77]
        (oncs,) = struct.unpack_from("<H", raw, 520)
        return cls(
            int.from_bytes(raw[0:2], "little"),
            _text(raw[4:24]),
            _text(raw[24:64]),
            _text(raw[64:72]),
            PAGE << mdts if mdts else 0,
            int.from_bytes(raw[516:520], "little"),
            int.from_bytes(raw[536:540], "little"),
            bool(oncs & ONCS_WRITE_ZEROES),
            bool(oncs & ONCS_DSM),
            bool(oncs & ONCS_COMPARE),
            bool(raw[525] & 1),
        )


def _text(raw: bytes) -> str:
    """A padded ASCII field; what is not printable comes out as a dot."""
    return "".join(char if char.isprintable() else "." for char in raw.decode("ascii", "replace")).strip(" .")


@dataclass(frozen=True, slots=True)
class NamespaceFacts:
    """What a driver needs from Identify Namespace: size in blocks, block and metadata bytes."""

    nsid: int
    blocks: int
    block_size: int
    metadata_size: int

    @classmethod
    def parse(cls, nsid: int, raw: bytes) -> NamespaceFacts:
        """From the 4096 bytes."""
        (blocks,) = struct.unpack_from("<Q", raw, 0)
        metadata, shift = struct.unpack_from("<HB", raw, 128 + 4 * (raw[26] & 15))
        if not 9 <= shift <= 16:
            raise UnsupportedError(f"namespace {nsid}: blocks of 2**{shift} bytes, 2**9 to 2**16 are supported")
        return cls(nsid, blocks, 1 << shift, metadata)


def controller(serial: str, model: str, mdts: int, namespaces: int, sgls: int) -> bytes:
    """Identify Controller (CNS 1)."""
    raw = bytearray(IDENTIFY_BYTES)
    struct.pack_into("<HH20s40s8s", raw, 0, 0x1D0F, 0x1D0F, *(
        text.ljust(width).encode("ascii")[:width] for text, width in ((serial, 20), (model, 40), ("1.0", 8))
    ))  # fmt: skip
    raw[77] = mdts
    struct.pack_into("<I", raw, 80, VERSION)
    raw[258], raw[259] = ABORT_LIMIT, EVENT_LIMIT
    raw[512], raw[513] = 0x66, 0x44
    struct.pack_into("<IH", raw, 516, namespaces, ONCS_COMPARE | ONCS_DSM | ONCS_WRITE_ZEROES)
    raw[525] = 1
    struct.pack_into("<I", raw, 536, sgls)
    return bytes(raw)


def namespace(space: Namespace) -> bytes:
    """Identify Namespace (CNS 0): one format; metadata travels in its own buffer."""
    raw = bytearray(IDENTIFY_BYTES)
    struct.pack_into("<QQQ", raw, 0, space.blocks, space.blocks, space.blocks)
    raw[27] = 2 if space.metadata_size else 0
    raw[33] = 1 | 1 << 3  # deallocated blocks read as zero; Write Zeroes may deallocate
    struct.pack_into("<HB", raw, 128, space.metadata_size, space.block_shift)
    return bytes(raw)


def active_namespaces(nsids: list[int], above: int) -> bytes:
    """The list of active namespace identifiers greater than ``above`` (CNS 2)."""
    found = sorted(nsid for nsid in nsids if nsid > above)[: IDENTIFY_BYTES // 4]
    return struct.pack(f"<{len(found)}I", *found).ljust(IDENTIFY_BYTES, b"\0")


def smart_log(counters: Counters) -> bytes:
    """The SMART / health log page (512 bytes): temperature, spare, and the traffic counters."""
    raw = bytearray(512)
    struct.pack_into("<BHBB", raw, 0, 0, 300, 100, 10)
    values = (
        -(-counters.bytes_read // 512_000),
        -(-counters.bytes_written // 512_000),
        counters.reads,
        counters.writes,
    )
    for at, value in zip(range(32, 96, 16), values, strict=True):
        raw[at : at + 16] = value.to_bytes(16, "little")
    return bytes(raw)

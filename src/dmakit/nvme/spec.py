"""Numbers of the NVM Express specification: opcodes, statuses, registers, identify offsets, descriptor types.

Only numbers and the packing of a status; behaviour lives with the noun it belongs to (``model``, ``queues``,
``prp``, ``sgl``). Sources: NVM Express Base Specification 2.0 (statuses: figure "Status Code - Generic Command
Status Values" and its neighbours; registers: "Property Definitions"), NVM Command Set Specification 1.0.
"""

from __future__ import annotations

from enum import IntEnum

PAGE = 4096  # the controller page used throughout (CC.MPS = 0)
SQE_BYTES = 64
CQE_BYTES = 16
IDENTIFY_BYTES = 4096
NSID_ALL = 0xFFFF_FFFF


class Admin(IntEnum):
    """Admin opcodes."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT = 0x0C


class Io(IntEnum):
    """NVM command set opcodes."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DSM = 0x09


class Status(IntEnum):
    """A completion's status: status code type << 8 | status code."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    COMMAND_ID_CONFLICT = 0x003
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    ABORT_REQUESTED = 0x007
    ABORTED_SQ_DELETION = 0x008
    INVALID_NAMESPACE = 0x00B
    COMMAND_SEQUENCE_ERROR = 0x00C
    INVALID_SGL_SEGMENT = 0x00D
    INVALID_NUMBER_OF_SGL_DESCRIPTORS = 0x00E
    DATA_SGL_LENGTH_INVALID = 0x00F
    METADATA_SGL_LENGTH_INVALID = 0x010
    SGL_DESCRIPTOR_TYPE_INVALID = 0x011
    PRP_OFFSET_INVALID = 0x013
    SGL_OFFSET_INVALID = 0x016
    SGL_DATA_BLOCK_GRANULARITY_INVALID = 0x01E
    LBA_OUT_OF_RANGE = 0x080
    CQ_INVALID = 0x100
    INVALID_QUEUE_ID = 0x101
    INVALID_QUEUE_SIZE = 0x102
    ABORT_LIMIT_EXCEEDED = 0x103
    ASYNC_EVENT_LIMIT_EXCEEDED = 0x105
    INVALID_INTERRUPT_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_CHANGEABLE = 0x10E
    WRITE_FAULT = 0x280
    UNRECOVERED_READ_ERROR = 0x281
    COMPARE_FAILURE = 0x285
    HOST_PATHING_ERROR = 0x370
    HOST_ABORTED = 0x371


DNR = 1 << 14  # in the 15-bit status field of a completion: do not retry


class Reg(IntEnum):
    """Offsets of the controller properties in BAR 0."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30
    CMBLOC = 0x38
    CMBSZ = 0x3C
    CMBMSC = 0x50
    CMBSTS = 0x58
    DOORBELLS = 0x1000


CC_EN = 1
CC_SHN_MASK = 3 << 14
CC_SHN_NORMAL = 1 << 14
CC_IOSQES_64 = 6 << 16
CC_IOCQES_16 = 4 << 20
CSTS_RDY = 1
CSTS_CFS = 2
CSTS_SHST_MASK = 3 << 2
CSTS_SHST_COMPLETE = 2 << 2

CMBMSC_CRE = 1  # the size and location registers may be read
CMBMSC_CMSE = 2  # the controller serves its memory at CBA
CMBSZ_SQS, CMBSZ_CQS, CMBSZ_LISTS, CMBSZ_RDS, CMBSZ_WDS = 1, 2, 4, 8, 16

CNS_NAMESPACE = 0x00
CNS_CONTROLLER = 0x01
CNS_ACTIVE_NAMESPACES = 0x02

FEATURE_ARBITRATION = 0x01
FEATURE_POWER = 0x02
FEATURE_TEMPERATURE = 0x04
FEATURE_ERROR_RECOVERY = 0x05
FEATURE_WRITE_CACHE = 0x06
FEATURE_QUEUES = 0x07
FEATURE_INTERRUPT_COALESCING = 0x08
FEATURE_ASYNC_EVENTS = 0x0B

LOG_ERROR = 0x01
LOG_SMART = 0x02
LOG_FIRMWARE = 0x03

# SGLS field of Identify Controller (bytes 536-539)
SGLS_BYTE = 1
SGLS_DWORD = 2
SGLS_BIT_BUCKET = 1 << 16
SGLS_LONGER_THAN_DATA = 1 << 18
SGLS_METADATA_SGL = 1 << 19

# Command dword 0: PSDT, bits 15:14 (bits 7:6 of the flags byte); its values are consts.PSDT_*
FLAG_SGL_METABUF = 1 << 6
FLAG_SGL_METASEG = 1 << 7

# SGL descriptor: type in the high nibble of byte 15, sub type in the low one
SGL_DATA = 0x0
SGL_BIT_BUCKET = 0x1
SGL_SEGMENT = 0x2
SGL_LAST_SEGMENT = 0x3
SGL_BYTES = 16

DSM_RANGE_BYTES = 16
DSM_MAX_RANGES = 256
DSM_DEALLOCATE = 1 << 2
WRITE_ZEROES_DEALLOCATE = 1 << 25


def status_name(status: int) -> str:
    """``'LBA_OUT_OF_RANGE'`` for 0x080 (with or without DNR); hexadecimal when the code has no name here."""
    code = status & 0x7FF
    return Status(code).name if code in Status._value2member_map_ else f"status {code:#05x}"

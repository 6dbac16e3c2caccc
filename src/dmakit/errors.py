"""The exceptions of dmakit: each answers whose fault it was, and carries the kernel's errno where there is one.

Five classes under one base. The base cannot be raised. Messages name the value and the rule that it breaks;
tests match them in full. Hot code below the public methods returns ``0`` or ``-errno`` like the kernel does;
the public method turns that into one of these.
"""

from __future__ import annotations

import errno as _errno


class DmakitError(Exception):
    """Base of all errors raised on purpose by dmakit; ``errno`` is positive, or 0 when the kernel has none."""

    def __init__(self, message: str, errno: int = 0) -> None:
        if type(self) is DmakitError:
            raise TypeError("DmakitError is a base: raise one of its subclasses")
        super().__init__(message)
        self.errno = errno

    @property
    def errno_name(self) -> str:
        """The errno's symbol (``EADDRINUSE``), or an empty string."""
        return _errno.errorcode.get(self.errno, "") if self.errno else ""


class MisuseError(DmakitError):
    """The caller broke a rule. ``rule`` is the short name of the rule where the contract checker has one."""

    def __init__(self, message: str, errno: int = _errno.EINVAL, *, rule: str = "") -> None:
        super().__init__(message, errno)
        self.rule = rule


class ExhaustedError(DmakitError):
    """A resource ran out: IOVA space, bounce slots, memory."""

    def __init__(self, message: str, errno: int = _errno.ENOMEM) -> None:
        super().__init__(message, errno)


class FaultError(DmakitError):
    """A device touched what it may not touch: the IOMMU blocked the access."""

    def __init__(self, message: str, errno: int = _errno.EFAULT, *, iova: int = 0, write: bool = False) -> None:
        super().__init__(message, errno)
        self.iova = iova
        self.write = write


class UnsupportedError(DmakitError):
    """This platform or configuration cannot do it; the message says what would."""

    def __init__(self, message: str, errno: int = _errno.EOPNOTSUPP) -> None:
        super().__init__(message, errno)


class HostError(DmakitError):
    """The host's Linux refused a call; the message names call, errno and likely cause."""

    def __init__(self, message: str, errno: int = _errno.EIO) -> None:
        super().__init__(message, errno)


class InputError(MisuseError):
    """A file or an option given to a command cannot be used; commands exit with status 2."""

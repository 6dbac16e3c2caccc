"""Writing results: JSON to a file that is complete or absent, or to standard output."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from pathlib import Path

from dmakit.errors import InputError


def check_json(where: str | None) -> None:
    """Refuse a place that cannot be written before the work is done."""
    if where is None or where == "-":
        return
    target = Path(where)
    if not where or target.is_dir():
        raise _refused(where, errno.EISDIR if where else errno.ENOENT)
    if not target.parent.is_dir():
        raise _refused(where, errno.ENOTDIR if target.parent.exists() else errno.ENOENT)


def write_json(document: object, where: str) -> None:
    """``where`` is a path, or ``-``. The file is written beside its place and renamed: never half a result.

    A pipe or a device that is there already is written to; a link stays a link.
    """
    text = json.dumps(document, indent=1) + "\n"
    if where == "-":
        sys.stdout.write(text)
        return
    check_json(where)
    try:
        target = Path(os.path.realpath(where))
        if target.exists() and not target.is_file():
            with target.open("w") as special:
                special.write(text)
        else:
            _replace(target, text)
    except OSError as error:
        raise _refused(where, error.errno or errno.EIO) from error


def _replace(target: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:64]}.")
    try:
        with os.fdopen(handle, "w") as part:
            part.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _refused(where: str, number: int) -> InputError:
    return InputError(f"--json {where or repr(where)}: cannot write there: {os.strerror(number)}")

"""Writing results: JSON to a file that is complete or absent, or to standard output."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from dmakit.errors import InputError


def write_json(document: object, where: str) -> None:
    """``where`` is a path, or ``-``. The file is written beside its place and renamed: never half a result."""
    text = json.dumps(document, indent=1)
    if where == "-":
        sys.stdout.write(text + "\n")
        return
    target = Path(where)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InputError(f"--json {where}: cannot write there: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w") as part:
            part.write(text + "\n")
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

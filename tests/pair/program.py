"""A program of calls over one machine, and everything that can be seen of it afterwards.

A program is plain data: a configuration and a list of (operation, a, b, c, d). The numbers are what Hypothesis drew;
each operation makes of them what it needs (``piece``: memory, ``pick``: one of what is live), so every program can run,
and many of its calls are wrong ones. ``run`` answers step by step with results or errors, and at the end with what the
machine holds: the bytes of every table page, the ledger, the events, the allocator's ranges, caches, bitmaps, buffers.

The operations are those of a few classes, by room. All of it runs in the child processes, once on each core: it decides
nothing by what core it runs on.
"""

from __future__ import annotations

import hashlib
from typing import Any

from dmakit.errors import DmakitError
from tests.pair.descriptors import Descriptors
from tests.pair.held import PAGE, PAGES
from tests.pair.mapping import Mapping
from tests.pair.others import Others
from tests.pair.spaces import Spaces
from tests.pair.units import Units

ROOMS = (Mapping, Spaces, Units, Descriptors, Others)
_NO_OPERATIONS = ("set_up", "spaces_end", "units_end", "descriptors_end", "others_end")
OPERATIONS = tuple(
    name
    for room in ROOMS
    for name, thing in vars(room).items()
    if callable(thing) and not name.startswith("_") and name not in _NO_OPERATIONS
)


class Run(Mapping, Spaces, Units, Descriptors, Others):
    """One program's machine with the operations of every room."""

    def tables(self) -> list[tuple[int, str]]:
        """(physical address, digest) of every table page, found by walking from the root."""
        domain = self.device.domain
        if domain is None:
            return []
        table, memory = domain.table, self.machine.memory
        found, queue = [], [(table.root, table.levels)]
        while queue:
            page, level = queue.pop()
            words = memory.words[page >> 3 : (page >> 3) + 512]
            found.append((page, hashlib.md5(bytes(words)).hexdigest()))
            for entry in words if level > 1 else ():
                if entry & table.fmt.present_bits and not (level <= 3 and entry & table.fmt.large_bit):
                    queue.append((entry & table.fmt.address_mask, level - 1))
        return found

    def end(self) -> dict[str, Any]:
        """Everything that is left to see."""
        device = self.device
        return {
            "tables": self.tables(),
            "ledger": self.machine.ledger.snapshot(),
            "locks": self.machine.ledger.lock_counts(),
            "events": [tuple(map(_plain, event)) for event in self.events],
            "live": self.machine.live(),
            "device nodes": device.iovad.nodes() if device.iovad is not None else [],
            "device cached": device.iovad.cached_pfns() if device.iovad is not None else [],
            "waiting": device.flush_queue.waiting() if device.flush_queue is not None else [],
            "memory": hashlib.md5(self.machine.memory.read(self.base, PAGES * PAGE)).hexdigest(),
            "reports": [str(report) for report in getattr(self.machine.checker, "reports", ())],
            **self.spaces_end(),
            **self.units_end(),
            **self.descriptors_end(),
            **self.others_end(),
        }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else int(value)


def run(program: tuple[int, list[tuple[str, int, int, int, int]]]) -> list[Any]:
    """Every step's result or error, and the end."""
    config, steps = program
    made = Run(config)
    answers: list[Any] = []
    for name, *numbers in steps:
        try:
            answers.append(getattr(made, name)(*numbers))
        except DmakitError as error:
            answers.append((type(error).__name__, str(error), error.errno))
        except (TypeError, ValueError, OverflowError) as error:
            answers.append((type(error).__name__,))
        answers.append(int(made.device.why))
    answers.append(made.end())
    return answers

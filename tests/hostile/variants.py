"""What is hostile about one call: a value, an array that overlaps another, a number that changes an array when asked.

Arrays are those whose ordinary value is a buffer of 64-bit words; numbers those whose ordinary value is an integer. A
*variant* names the parameter it is about (``at``), by its place, and sometimes another (``other``):

* ``value``: the hostile value number ``which`` in its place;
* ``same``: the very array of ``other``; ``ahead`` and ``behind``: a slice of the same pool, a word further or before;
* ``readonly``, ``spread``: its ordinary words, not to be written, or every second word of a longer array;
* ``grow``, ``shrink``, ``change``: a number that, when it is asked for its value, resizes the array ``other`` or fills
  it with ones. A buffer that is held cannot be resized: Python refuses that, and the number answers all the same.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tests.hostile import values
from tests.hostile.recipes import usual
from tests.hostile.surface import Entry
from tests.hostile.world import World

BESIDE = ("same", "ahead", "behind")
ALONE = ("readonly", "spread")
LATE = ("grow", "shrink", "change")


@dataclass(frozen=True)
class Variant:
    """See the head of this file."""

    kind: str
    at: int
    which: int = 0
    other: int = -1


class Late:
    """A number that does something to an array before it tells its value."""

    def __init__(self, value: int, act: Callable[[], object]) -> None:
        self.value = value
        self.act = act

    def __index__(self) -> int:
        with suppress(BufferError):
            self.act()
        return self.value

    def __repr__(self) -> str:
        return f"Late({self.value})"


def is_words(value: Any) -> bool:
    """Whether an ordinary value is an array of 64-bit words."""
    return isinstance(value, array) and value.typecode == "Q"


def variants(entry: Entry, seed: int, share: int) -> list[Variant | None]:
    """What is hostile about each call of an entry point; None is the ordinary call."""
    count = len(values.everything())
    found: list[Variant | None] = [None]
    for at in range(len(entry.parameters)):
        chosen = [Variant("value", at, which) for which in range(count)]
        rng = random.Random(zlib.crc32(f"{seed} {entry.key} {at}".encode()))
        found += chosen if share == 1 else rng.sample(chosen, max(2, count // share))
    pairs = _of_arrays(entry)
    rng = random.Random(zlib.crc32(f"{seed} {entry.key} arrays".encode()))
    return found + (pairs if share == 1 else rng.sample(pairs, -(-len(pairs) // 8)))


def _of_arrays(entry: Entry) -> list[Variant]:
    """The variants that are about the arrays of an entry point, of which most have none."""
    if entry.name == "__init__":
        return []
    world = World()
    ordinary = [usual(world, entry, parameter.name) for parameter in entry.parameters]
    arrays = [at for at, value in enumerate(ordinary) if is_words(value)]
    numbers = [at for at, value in enumerate(ordinary) if type(value) is int]
    found = [Variant(kind, at) for at in arrays for kind in ALONE]
    found += [Variant(kind, at, other=other) for at in arrays for other in arrays if other != at for kind in BESIDE]
    return found + [Variant(kind, at, other=other) for at in numbers for other in arrays for kind in LATE]


def apply(variant: Variant, ordinary: list[Any]) -> list[Any]:
    """The arguments of a call, made hostile."""
    made = list(ordinary)
    at, other = variant.at, variant.other
    if variant.kind == "value":
        made[at] = values.everything()[variant.which]
    elif variant.kind == "readonly":
        made[at] = memoryview(made[at]).toreadonly()
    elif variant.kind == "spread":
        made[at] = memoryview(array("Q", [word for word in made[at] for _ in range(2)]))[::2]
    elif variant.kind == "same":
        made[at] = made[other]
    elif variant.kind in BESIDE:
        made[at], made[other] = _beside(made[at], made[other], 1 if variant.kind == "ahead" else -1)
    else:
        made[at] = Late(made[at], _acting(variant.kind, made[other]))
    return made


def _beside(one: Any, other: Any, step: int) -> tuple[Any, Any]:
    """Slices of one pool; the words of ``other`` where both lie."""
    size = max(len(one), len(other))
    pool = memoryview(array("Q", bytes(8 * (size + 2))))
    first = 1 + step
    pool[first : first + len(one)] = memoryview(one)
    pool[1 : 1 + len(other)] = memoryview(other)
    return pool[first : first + len(one)], pool[1 : 1 + len(other)]


def _acting(kind: str, words: Any) -> Callable[[], object]:
    def change() -> None:
        for at in range(len(words)):
            words[at] = (1 << 64) - 1

    return {"grow": lambda: words.extend(words), "shrink": lambda: words.pop() if words else None, "change": change}[
        kind
    ]


def shown(variant: Variant | None, entry: Entry, made: list[Any]) -> str:
    """A text for reports, the same in every process."""
    if variant is None:
        return "ordinary"
    name = entry.parameters[variant.at].name
    if variant.kind == "value":
        return f"{name}={values.shown(made[variant.at])}"
    return f"{name} {variant.kind}" + (f" {entry.parameters[variant.other].name}" if variant.other >= 0 else "")


def loose(variant: Variant | None, entry: Entry) -> bool:
    """Whether the method itself looks at everything hostile (``Parameter.loose``)."""
    if variant is None:
        return True
    return all(entry.parameters[at].loose for at in (variant.at, variant.other) if at >= 0)

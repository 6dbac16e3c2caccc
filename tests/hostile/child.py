"""The child process: runs the calls of some modules and tells what each one did, on one core.

    python -m tests.hostile.child SEED SHARE FIRST MODULE …

Before a call its description goes into a file (argument of ``--note``), so that the parent can say which call killed
the process; a call that takes too long ends it with a traceback. One line of JSON a call: what was called, how it
ended, and whether a refusal changed anything. ``SHARE``: run one of so many variants, chosen by the seed.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import json
import os
import re
import resource
import sys
from typing import Any

from dmakit.errors import DmakitError
from tests.hostile.recipes import usual
from tests.hostile.surface import Entry, entries
from tests.hostile.variants import Variant, apply, is_words, loose, shown, variants
from tests.hostile.world import World

ADDRESS = re.compile(r" at 0x[0-9a-f]{8,}")  # of a Python object in its repr
REFUSED = (DmakitError, TypeError, ValueError, OverflowError)
HEADROOM = 1 << 30  # bytes of address space that a call may ask for, beyond what is in use before it
TOO_LONG = 240  # seconds


def cap_memory(on: bool) -> None:
    """No call may take more than HEADROOM of address space; what is built between the calls may."""
    if not on:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, resource.RLIM_INFINITY))


def target(world: World, entry: Entry) -> Any:
    """What is called: a function, a class, or a bound method."""
    module = sys.modules[entry.module]
    if not entry.owner:
        return getattr(module, entry.name)
    if entry.name == "__init__":
        return getattr(module, entry.owner)
    return getattr(world.part(entry.owner), entry.name)


def arguments(world: World, entry: Entry, variant: Variant | None) -> tuple[list[Any], dict[str, Any], str]:
    """Positional and keyword arguments, and what is hostile about them."""
    hostile = -1 if variant is None else variant.at
    left_out = [
        entry.name == "__init__" and item.optional and at != hostile for at, item in enumerate(entry.parameters)
    ]
    ordinary = [
        None if skipped else usual(world, entry, item.name)
        for item, skipped in zip(entry.parameters, left_out, strict=True)
    ]
    made = ordinary if variant is None else apply(variant, ordinary)
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for parameter, skipped, value in zip(entry.parameters, left_out, made, strict=True):
        if skipped:
            continue
        if parameter.keyword or entry.name == "__init__":
            keywords[parameter.name] = value
        else:
            positional.append(value)
    return positional, keywords, shown(variant, entry, made)


def words_of(values: list[Any]) -> str:
    """A digest of the arrays among the arguments, as a call leaves them."""
    views = [value for value in values if is_words(value) or (isinstance(value, memoryview) and value.format == "Q")]
    return hashlib.md5(b"|".join(view.tobytes() for view in views)).hexdigest()


def outcome(call: Any, positional: list[Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """How a call ended."""
    try:
        answer = call(*positional, **keywords)
    except Exception as error:
        own = isinstance(error, DmakitError)
        return {
            "raised": type(error).__name__,
            "text": ADDRESS.sub("", str(error)) if own else "",
            "own": own,
            "allowed": isinstance(error, REFUSED),
            "message": str(error)[:200],
        }
    kind = answer if isinstance(answer, (int, bool, type(None))) else type(answer).__name__
    return {"answer": kind}


def run(entry: Entry, seed: int, share: int, first: int, number: int, note: int) -> int:
    """Every variant of one entry point from call ``first`` on; the number of the call after them."""
    world = None
    for variant in variants(entry, seed, share):
        number += 1
        if number <= first:
            continue
        if world is None:
            world = World()
        faulthandler.dump_traceback_later(TOO_LONG, exit=True)
        call = target(world, entry)
        positional, keywords, said = arguments(world, entry, variant)
        text = f"{number} {entry.key}({said})"
        os.pwrite(note, text.encode()[:400].ljust(400), 0)
        before = world.state()
        cap_memory(True)
        ended = outcome(call, positional, keywords)
        cap_memory(False)
        after = world.state()
        refused = ended.get("allowed", True) and "raised" in ended
        ended |= {"call": f"{entry.key}({said})", "n": number, "changed": refused and before != after}
        ended |= {"loose": loose(variant, entry)}
        if variant is not None and variant.kind != "value":
            ended["words"] = words_of([*positional, *keywords.values()])
        print(json.dumps(ended))
        if "raised" not in ended:  # it may have ended the object
            world = None
    return number


def main() -> None:
    """See the head of this file."""
    faulthandler.enable()
    note = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    seed, share, first = (int(argument) for argument in sys.argv[2:5])
    number = 0
    for module in sys.argv[5:]:
        for entry in entries(module):
            number = run(entry, seed, share, first, number, note)
            gc.collect()
    print(json.dumps({"done": number}))


if __name__ == "__main__":
    main()

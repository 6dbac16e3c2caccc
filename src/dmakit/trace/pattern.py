"""The event declarations flattened into the integers that the scanner runs on, and the layout of its rows.

``pattern.pxd`` repeats the constants for compiled code; a test holds the two equal.
"""

from __future__ import annotations

from array import array

from dmakit.trace.events import EVENTS, Event

HEAD = 6  # integers before the values of a row: line, stamp, cpu, pid, context, kind
LOST = 255  # the kind of a ``CPU:1 [LOST 123 EVENTS]`` marker; its value 0 is the number of events
OTHER, NOTE, MALFORMED, RECORD = 0, 1, 2, 3
STEP = 5  # integers per step: how, optional, slot, anchor start, anchor length
HOW_NUMBER, HOW_HEX, HOW_WORD, HOW_TEXT, HOW_LIST = 0, 1, 2, 3, 4
ENTRY, RETURN = 1, 2  # salts: a function's name at its entry, at its return
TABLE = 512  # slots of the event-name table (a power of two, at most half full)


class Pattern:
    """The event declarations as flat integers: steps, anchor bytes, columns and slots of each kind."""

    def __init__(self, events: tuple[Event, ...] = EVENTS) -> None:
        how = {"n": HOW_NUMBER, "h": HOW_HEX, "s": HOW_WORD, "t": HOW_TEXT, "l": HOW_LIST}
        self.events = events
        self.first_step = array("q", [0])
        self.steps = array("q")
        self.anchors: list[bytes] = []
        self.slots: list[dict[str, tuple[int, str]]] = []
        for event in events:
            slots: dict[str, tuple[int, str]] = {}
            slot = 0
            for field in event.fields:
                anchor = field.anchor.encode()
                start = sum(map(len, self.anchors))
                self.steps.extend((how[field.how], field.optional, slot, start, len(anchor)))
                self.anchors.append(anchor)
                slots[field.column] = (slot, field.how)
                slot += 2 if field.how == "l" else 1
            self.slots.append(slots)
            self.first_step.append(len(self.steps) // STEP)
        self.width = max(sum(2 if f.how == "l" else 1 for f in event.fields) for event in events)

    def names(self) -> list[tuple[bytes, int, int]]:
        """(name, kind, salt) of every event name, and of every traced kernel function under salt ENTRY or RETURN."""
        found = []
        for kind, event in enumerate(self.events):
            found += [(name.encode(), kind, 0) for name in (event.name, *event.aliases)]
            if event.symbol:
                found.append((event.symbol.encode(), kind, RETURN if event.is_return else ENTRY))
        return found

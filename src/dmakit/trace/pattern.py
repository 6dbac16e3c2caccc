"""The event declarations flattened into the integers that the scanner runs on."""

from __future__ import annotations

from array import array

from dmakit.consts import (
    HOW_HEX,
    HOW_LIST,
    HOW_NUMBER,
    HOW_TEXT,
    HOW_WORD,
    SALT_ENTRY,
    SALT_RETURN,
    SCAN_LOST,
    SCAN_STEP,
)
from dmakit.trace.events import EVENTS, Event


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
            self.first_step.append(len(self.steps) // SCAN_STEP)
        self.width = array("q", [1] * (SCAN_LOST + 1))  # slots of a row of each kind
        for kind, event in enumerate(events):
            self.width[kind] = sum(2 if field.how == "l" else 1 for field in event.fields)
        self.widest = max(self.width)

    def names(self) -> list[tuple[bytes, int, int]]:
        """(name, kind, salt): every event name, and every traced kernel function with the salt of entry or return."""
        found = []
        for kind, event in enumerate(self.events):
            found += [(name.encode(), kind, 0) for name in (event.name, *event.aliases)]
            if event.symbol:
                found.append((event.symbol.encode(), kind, SALT_RETURN if event.is_return else SALT_ENTRY))
        return found

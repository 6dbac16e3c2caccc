"""Premapped memory: what a caller *offers* is registered at once, and a request on it computes addresses.

An ``Offer`` is memory of which its owner says when it begins (``offer``) and when it ends (``withdraw``): only he
knows, and a mapping that outlives its memory would let the device write to somebody else's. A request may lie in
several.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

from dmakit.block.request import Request
from dmakit.consts import L_PASSES, PATH_REGISTERED
from dmakit.errors import MisuseError
from dmakit.nvme.listed import Listed, Ranges
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.registration import Registration, register, shape_of
from dmakit.reasons import Reason

_BEHIND = 1 << 64


class Offer:
    """Memory of a caller: ``pieces`` are (phys, length), ``shape`` their number and that of their pages.

    ``registration``: while it is mapped; ``busy``: requests in flight on it. Of ``nvme.auto``: ``paid`` and ``price``
    (ns), ``pinned`` (stays registered), ``refused`` (why the last attempt to register it failed, 0 = it did not).
    """

    __slots__ = ("addresses", "busy", "demand", "paid", "pieces", "pinned", "price", "refused", "registration", "shape")

    def __init__(self, pieces: Sequence[tuple[int, int]], demand: Callable[[Offer], None]) -> None:
        self.pieces = list(pieces)
        self.shape = shape_of(pieces)
        self.demand = demand
        self.registration: Registration | None = None
        self.addresses: dict[tuple[int, int], int] = {}
        self.busy = 0
        self.paid = 0.0
        self.price: float | None = None
        self.pinned = False
        self.refused = 0

    def hold(self, registration: Registration) -> None:
        """It is mapped now."""
        self.registration = registration
        self.addresses = {(phys, length): addr for phys, length, addr in registration.pieces}

    def release(self) -> None:
        """Unmap it; nothing when it is not mapped."""
        registration, self.registration = self.registration, None
        if registration is not None:
            registration.release()

    def address(self, phys: int) -> int:
        """The device address of a byte of it, which from now on stays valid until it is withdrawn."""
        self.demand(self)
        assert self.registration is not None
        return self.registration.address(phys)


Part = tuple[Offer, tuple[int, int], int, int]
"""Part of a request: the offer, the piece of it (phys, length), bytes into the piece, length."""


class PremapMapper(Listed):
    """Offered memory is registered at once; memory that nobody offered cannot be used."""

    path = PATH_REGISTERED

    def __init__(self, requests: RequestMapper) -> None:
        super().__init__(requests)
        self._places: list[tuple[int, int]] = []  # (phys, length) of every piece, sorted
        self._owners: list[Offer] = []

    # Memory -------------------------------------------------------------------------------------------------

    def offer(self, pieces: Sequence[tuple[int, int]]) -> Offer:
        """Let requests use this memory until ``withdraw``; the errors of ``register``, with nothing left."""
        return self.add(register(self.device, pieces))

    def add(self, registration: Registration) -> Offer:
        """Let requests use memory that is registered already; it is released with the offer."""
        made = Offer([(phys, length) for phys, length, _ in registration.pieces], self.demand)
        made.hold(registration)
        made.pinned = True
        self._note(made)
        return made

    def demand(self, offer: Offer) -> None:
        """Somebody needs its addresses: they are there."""

    def withdraw(self, offer: Offer) -> None:
        """Requests may not use it any more, and nothing of it is in flight: unmap it."""
        keep = [at for at, owner in enumerate(self._owners) if owner is not offer]
        self._places = [self._places[at] for at in keep]
        self._owners = [self._owners[at] for at in keep]
        offer.release()

    def _note(self, offer: Offer) -> None:
        for place in offer.pieces:
            at = bisect.bisect_right(self._places, place)
            self._places.insert(at, place)
            self._owners.insert(at, offer)

    # Requests -----------------------------------------------------------------------------------------------

    def _cut(self, memory: Ranges) -> list[Part] | int:
        """A request's memory by offers; the first address that no offer holds, when there is one.

        Where pieces overlap, the one that begins last counts, and of those the longest.
        """
        parts: list[Part] = []
        places, owners = self._places, self._owners
        for phys, length in memory:
            while length:
                at = bisect.bisect_right(places, (phys, _BEHIND)) - 1
                start, size = places[at] if at >= 0 else (0, 0)
                if phys >= start + size:
                    return phys
                take = min(length, start + size - phys)
                parts.append((owners[at], places[at], phys - start, take))
                phys, length = phys + take, length - take
        return parts

    def _joined(self, parts: list[Part]) -> Ranges:
        """Device ranges of registered parts; neighbours joined."""
        found: Ranges = []
        self.ledger.count(L_PASSES)
        for owner, place, offset, length in parts:
            addr = owner.addresses[place] + offset
            if found and sum(found[-1]) == addr:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((addr, length))
        return found

    def ranges(self, request: Request) -> tuple[Ranges, Any, int]:
        """Addresses computed."""
        parts = self._cut(request.data.vectors)
        if isinstance(parts, int):
            raise MisuseError(f"memory at {parts:#x} is not registered: the premap strategy maps nothing itself")
        return self._joined(parts), None, int(Reason.PREMAPPED)

    def release(self, request: Request, token: Any, cpu: int) -> None:
        """Nothing: registered memory stays mapped."""

"""The strategy that chooses: windows a request (two-step), or registered memory (premap), by what they cost here.

A window costs w each time, registered memory u < w each time and once the price p of registering. How often a buffer
will be used is not known, which is the *ski rental* problem: rent until the rent would exceed the price, then buy. Rent
here is the excess w − u (both ways pay u). Per buffer, online:

    use: rent + paid ≤ price  →  a window, paid += rent;   else  →  register, and stay registered

* *Never more than twice the best choice.* Whoever knew the number of uses would pay min(sum of rents, p). Before
  registering at most p was paid; registering adds p, and happens only when the rents exceed p, so that p is the best.
* A request on several buffers splits its rent evenly among those that are not registered. Then the bound is twice the
  best choice, plus one window for each registration (a request may trigger one and need a window all the same).
* *Limits.* When a mapping is refused for lack of something (type1's mappings, locked memory, IOVAs) the registrations
  that were used least recently and have nothing in flight are ended, as many pieces and pages as the newcomer needs,
  and it is tried once more; else it stays with windows. The account of an evicted or refused buffer begins anew, so it
  cannot try again before it has paid its price in rent once more: whatever happens, the total stays below twice what
  two-step alone would have paid.

Only offered memory (``premap``) is registered: its owner says when it ends. Costs are measured when the first request
on offered memory comes (``costs``); nothing is decided by time that passes later, so runs with equal costs are equal.
The reason recorded is this module's where a fast path was taken, else the one of the code that left it.
"""

from __future__ import annotations

import errno
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from dmakit.block.request import Request
from dmakit.consts import PATH_MAP_PHYS, PATH_REGISTERED, PATH_TWO_STEP
from dmakit.errors import DmakitError, ExhaustedError, HostError, UnsupportedError
from dmakit.nvme.costs import Costs, measure
from dmakit.nvme.iod import Iod
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.premap import Offer, PremapMapper
from dmakit.nvme.registration import register, shape_of
from dmakit.reasons import Reason

_LIMITS = (errno.ENOMEM, errno.ENOSPC)


def _limited(error: object) -> bool:
    """Whether less in use would help."""
    return isinstance(error, ExhaustedError) or (isinstance(error, HostError) and error.errno in _LIMITS)


class AutoMapper(PremapMapper):
    """``costs``: None until measured; ``unmeasured``: why they could not be; ``taken``: requests by reason;
    ``evictions``; ``source``: what measures."""

    def __init__(self, requests: RequestMapper, source: Callable[[RequestMapper], Costs] = measure) -> None:
        super().__init__(requests)
        self.source = source
        self.costs: Costs | None = None
        self.unmeasured: DmakitError | None = None
        self.taken: Counter[Reason] = Counter()
        self.evictions = 0
        self._recent: OrderedDict[Offer, None] = OrderedDict()  # registered and not pinned, least recently used first

    # Memory -------------------------------------------------------------------------------------------------

    def offer(self, pieces: Sequence[tuple[int, int]]) -> Offer:
        """Let requests use this memory until ``withdraw``; nothing is mapped yet."""
        made = Offer(pieces, self.demand)
        self._note(made)
        return made

    def demand(self, offer: Offer) -> None:
        """Its addresses are wanted: register it if it is not, and leave it so."""
        if offer.registration is None and (error := self._register(offer)) is not None:
            raise error
        offer.pinned = True
        self._recent.pop(offer, None)

    def withdraw(self, offer: Offer) -> None:
        """See ``PremapMapper``."""
        self._recent.pop(offer, None)
        super().withdraw(offer)

    def _register(self, offer: Offer) -> DmakitError | None:
        """Register, making room once; the error when it is refused."""
        offer.paid, offer.refused = 0.0, 0
        error = self._try(offer)
        if _limited(error) and self._make_room(*offer.shape):
            error = self._try(offer)
        if error is None:
            self._recent[offer] = None
        else:
            barred = isinstance(error, UnsupportedError)
            offer.refused = int(Reason.NOT_REGISTRABLE if barred else Reason.REGISTRATION_REFUSED)
        return error

    def _try(self, offer: Offer) -> DmakitError | None:
        try:
            offer.hold(register(self.device, offer.pieces))
        except DmakitError as error:
            return error
        return None

    def _make_room(self, pieces: int, pages: int) -> bool:
        """End the registrations used least recently, until so much is free; whether any was ended."""
        before = self.evictions
        for offer in list(self._recent):
            if pieces <= 0 and pages <= 0:
                break
            if not offer.busy:
                del self._recent[offer]
                offer.paid = 0.0
                offer.release()
                self.evictions += 1
                pieces, pages = pieces - offer.shape[0], pages - offer.shape[1]
        return self.evictions > before

    # The choice ---------------------------------------------------------------------------------------------

    def measured(self) -> Costs | None:
        """The costs, measured the first time; None when that failed (``unmeasured``)."""
        if self.costs is None and self.unmeasured is None:
            try:
                self.costs = self.source(self.requests)
            except DmakitError as error:
                self.unmeasured = error
        return self.costs

    def _decide(self, owners: list[Offer], shape: tuple[int, int]) -> Reason:
        """Why a request of this shape (pieces, pages) on these offers goes the way it does."""
        missing = [offer for offer in owners if offer.registration is None]
        if missing:
            costs = self.measured()
            if costs is None:
                barred = isinstance(self.unmeasured, UnsupportedError)
                return Reason.NOT_REGISTRABLE if barred else Reason.COSTS_UNKNOWN
            rent = costs.window.of(*shape) - costs.use.of(*shape)
            if rent <= 0:
                return Reason.WINDOW_CHEAPER
            for offer in missing:
                self._charge(offer, rent / len(missing), costs)
            left = next((offer for offer in missing if offer.registration is None), None)
            if left is not None:
                return Reason(left.refused) if left.refused else Reason.RENT_BELOW_PRICE
        return Reason.PREMAPPED if all(offer.pinned for offer in owners) else Reason.RENT_ABOVE_PRICE

    def _charge(self, offer: Offer, rent: float, costs: Costs) -> None:
        """One more window's rent, or the purchase."""
        if offer.refused == Reason.NOT_REGISTRABLE:
            return
        if offer.price is None:
            offer.price = costs.price.of(*offer.shape)
        if offer.paid + rent <= offer.price:
            offer.paid += rent
        else:
            self._register(offer)

    # Requests -----------------------------------------------------------------------------------------------

    def map(self, request: Request) -> Iod:
        """See ``Mapper``."""
        if request.data.count == 0 or request.integrity.count:
            return self.requests.map(request)
        memory = request.data.vectors
        shape, parts = shape_of(memory), self._cut(memory)
        if isinstance(parts, int):
            return self._window(request, shape, Reason.NOT_OFFERED)
        owners = list({part[0]: None for part in parts})
        for offer in owners:
            offer.busy += 1  # what one of them needs must not evict another
        reason = self._decide(owners, shape)
        if any(offer.registration is None for offer in owners):
            self.release(request, owners, request.cpu)
            return self._window(request, shape, reason)
        for offer in owners:
            if not offer.pinned:
                self._recent.move_to_end(offer)
        self.taken[reason] += 1
        return self._give(Iod(request), self._joined(parts), owners, int(reason))

    def _window(self, request: Request, shape: tuple[int, int], reason: Reason) -> Iod:
        """Two-step; when it is refused for want of room, once more after making some."""
        iod = self.requests.map(request)
        if iod.status and _limited(iod.error) and self._make_room(*shape):
            iod = self.requests.map(request)
        if iod.path in (PATH_MAP_PHYS, PATH_TWO_STEP):
            iod.reason = int(reason)
        self.taken[Reason(iod.reason)] += 1
        return iod

    def unmap(self, iod: Iod, *, cpu: int | None = None) -> None:
        """See ``Mapper``."""
        if iod.path == PATH_REGISTERED:
            super().unmap(iod, cpu=cpu)
        else:
            self.requests.unmap(iod, cpu=cpu)

    def release(self, request: Request, token: Any, cpu: int) -> None:
        """Its memory may be evicted again."""
        for offer in token:
            offer.busy -= 1

    # What a person sees -------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """Choices and costs in words."""
        chosen = ", ".join(f"{reason.name} {count}" for reason, count in sorted(self.taken.items()))
        found = [f"auto: {chosen or 'no requests'}; {self.evictions} registrations ended to make room"]
        if self.costs is not None:
            found.append(f"auto: {self.costs}")
        if self.unmeasured is not None:
            found.append(f"auto: costs not measured: {self.unmeasured}")
        return found

    def report(self) -> dict[str, Any]:
        """Costs, choices, evictions, as plain data."""
        return {
            "costs": self.costs.report() if self.costs is not None else None,
            "unmeasured": str(self.unmeasured) if self.unmeasured is not None else None,
            "requests": {reason.name: count for reason, count in sorted(self.taken.items())},
            "evictions": self.evictions,
        }

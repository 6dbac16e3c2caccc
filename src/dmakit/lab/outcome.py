"""What every run of a strategy tells, on the software machine (``compare``) and on a real controller (``hardware``)."""

from __future__ import annotations

from dataclasses import dataclass, field

from dmakit.lab.request_table import Requests
from dmakit.reasons import PathLog


@dataclass(slots=True)
class Outcome:
    """``requests`` that completed with ``size`` bytes, of which ``wrong`` differ; ``failed`` ones; the ``paths`` taken.

    ``unavailable``: why the strategy could not run at all; ``workload``: the requests that were asked for."""

    name: str
    requests: int = 0
    size: int = 0
    wrong: int = 0
    failed: int = 0
    paths: PathLog = field(default_factory=lambda: PathLog((), frozenset()))
    unavailable: str = ""
    workload: Requests = field(default_factory=Requests)

    def facts(self) -> dict[str, object]:
        """The JSON form of these."""
        return {
            "name": self.name,
            "requests": self.requests,
            "bytes": self.size,
            "bytes_wrong": self.wrong,
            "failed": self.failed,
            "paths": {
                path: {"count": sum(reasons.values()), "reasons": {reason.name: n for reason, n in reasons.items()}}
                for path, reasons in self.paths.counts().items()
            },
            "unavailable": self.unavailable or None,
        }

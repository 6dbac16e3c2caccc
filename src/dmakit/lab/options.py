"""The options of a comparison: one set of machine properties under which every strategy runs.

``Options.check`` refuses combinations that no machine has, naming both values. ``EMBEDDED`` is the preset of
thread 002's objection: no IOMMU, a device that does not snoop, a 32-bit mask.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from dmakit.dma.defects import defects_of
from dmakit.errors import InputError

IOMMUS = ("vtd", "x86", "none")
MODES = ("lazy", "strict", "passthrough")
POLICIES = ("linux", "augmented")
PEERS = ("none", "bus", "bridge")
PLATFORMS = ("server", "embedded")


@dataclass(frozen=True, slots=True)
class Options:
    """What the machine and the device are like; the same for every strategy of one comparison."""

    iommu: str = "vtd"
    mode: str = "lazy"
    policy: str = "linux"
    defects: tuple[str, ...] = ()
    seed: int = 0
    untrusted: bool = False
    coherent: bool = True
    p2p: str = "none"
    mask_bits: int = 64
    sgl: bool = True
    max_hw_sectors: int = 0
    checker: bool = False
    platform: str = "server"

    def check(self) -> Options:
        """Returns itself, or raises InputError naming the values that cannot be together."""
        for name, allowed in (("iommu", IOMMUS), ("mode", MODES), ("policy", POLICIES), ("p2p", PEERS)):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"--{name} {value}: must be one of {', '.join(allowed)}")
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"--seed {self.seed}: must be between 0 and 2^64-1")
        translating = self.iommu != "none" and self.mode != "passthrough"
        if self.iommu == "none" and self.mode == "strict":
            raise InputError("--iommu none --mode strict: without an IOMMU there is nothing to invalidate")
        if self.untrusted and not translating:
            where = "--iommu none" if self.iommu == "none" else "--mode passthrough"
            raise InputError(f"--untrusted {where}: Linux gives untrusted devices a translating domain, always")
        if self.untrusted and self.mode == "lazy":
            return replace(self, mode="strict")
        if self.p2p != "none" and not self.coherent:
            raise InputError(f"--p2p {self.p2p} --no-coherent: peer memory has no CPU caches to maintain")
        if self.p2p == "bus" and self.checker:
            raise InputError(
                "--p2p bus --checker: bus addresses come from no mapping call that the checker could watch"
            )
        defects_of(self.defects)
        return self

    def describe(self) -> dict[str, object]:
        """For reports: every option that a rerun needs."""
        return {**asdict(self), "defects": list(self.defects)}

    def command_line(self, plain: Options | None = None) -> str:
        """The options as they are typed; what is as in ``plain`` (the defaults) is left out."""
        plain = plain or Options()
        if self.platform == "embedded":
            words = ["--platform embedded"]
        else:
            words = [
                f"--{name} {getattr(self, name)}"
                for name in ("iommu", "mode", "policy", "p2p")
                if getattr(self, name) != getattr(plain, name) and not (name == "mode" and self.untrusted)
            ]
            words += ["--no-coherent"] if plain.coherent and not self.coherent else []
        words += [f"--defect {name}" for name in self.defects]
        words += ["--untrusted"] if self.untrusted else []
        words += ["--no-sgl"] if not self.sgl else []
        words += [f"--seed {self.seed}"] if self.seed else []
        return " ".join(words)


EMBEDDED = Options(iommu="none", coherent=False, mask_bits=32, platform="embedded")

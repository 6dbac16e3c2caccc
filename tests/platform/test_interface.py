"""Every platform offers the same interface, name for name and parameter for parameter."""

from __future__ import annotations

import inspect

import pytest

from dmakit.platform.interface import Platform
from dmakit.platform.linux.machine import Machine as HostMachine
from dmakit.platform.soft import Machine as SoftMachine
from tests.support.vfio.host import FakeHost

CALLS = [name for name in vars(Platform) if inspect.isfunction(getattr(Platform, name)) and name != "__init__"]


def as_platforms(soft: SoftMachine, host: HostMachine) -> list[Platform]:
    """Checked by mypy: both are platforms."""
    return [soft, host]


@pytest.mark.parametrize("machine", [SoftMachine, HostMachine])
def test_a_machine_has_every_call_with_its_parameters(machine: type) -> None:
    public = [name for name in CALLS if not name.startswith("_")]
    assert len(public) == 8
    for name in public:
        wanted, offered = (inspect.signature(getattr(kind, name)).parameters for kind in (Platform, machine))
        more = [parameter for key, parameter in offered.items() if key not in wanted]
        assert [key for key in offered if key in wanted] == list(wanted), name
        assert all(parameter.default is not parameter.empty for parameter in more), name
        for key, parameter in wanted.items():
            assert (offered[key].kind, offered[key].default) == (parameter.kind, parameter.default), (name, key)


def test_a_machine_has_every_attribute_and_ends_with_nothing_in_use() -> None:
    with SoftMachine(ram="64M", swiotlb="1M") as soft, HostMachine(ram="16M", kernel=FakeHost([])) as host:
        for machine in as_platforms(soft, host):
            for name in Platform.__annotations__:
                assert hasattr(machine, name), name
            assert machine.snapshot().keys() == machine.ledger.snapshot().keys()
            assert not any(machine.live().values())
        assert None not in soft.snapshot().values()
        assert None in host.snapshot().values()

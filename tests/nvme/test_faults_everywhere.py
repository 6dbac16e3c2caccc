"""The declared faults through ``Controller.open``, on every platform: what ``test_faults`` shows of the driver alone.

On type1 and iommufd the broken controller stands behind the fake kernel: its registers, its time (short time-outs
that really pass), its unmapping and closing go through the code that talks to a real one. ``late`` and ``slow-ready``
need a clock that the test can move, and stay with the software machine's.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
from tests.nvme.platforms import PLATFORMS, World, world

from dmakit.clock import VirtualClock
from dmakit.errors import DmakitError
from dmakit.nvme.controller import Controller
from dmakit.nvme.faults import FAULTS, Fault, FaultyModel
from dmakit.nvme.registers import ControllerError
from dmakit.nvme.spec import Status

everywhere = pytest.mark.parametrize("platform", PLATFORMS)
HEALED = ("fatal", "bad-command", "bad-queue", "bad-head", "twice")  # a reset, and the command is issued again
STRUCK = 2  # the write that the fault strikes
TOLD = {
    "status": r"WRITE_FAULT",
    "stall": r"no completion within 0.2 s, aborted$",
    "deaf": r"no completion within 0.2 s; Abort: ",
    "wrong-phase": r"no completion within 0.2 s",
}


def broken(*faults: Fault) -> dict[str, Any]:
    """The options of a world whose controller has ``faults``."""
    return {"build": partial(FaultyModel, clock=VirtualClock(), faults=list(faults))}


def write_eight(controller: Controller) -> tuple[dict[int, bytes], dict[int, DmakitError]]:
    """Eight writes of a block: the data of each, and the error of those that failed."""
    sent = {8 * at: random.Random(at).randbytes(512) for at in range(8)}
    errors = {}
    for lba, data in sent.items():
        try:
            controller.namespaces[1].write(lba, data)
        except DmakitError as error:
            errors[lba] = error
    return sent, errors


def check_medium(w: World, sent: dict[int, bytes], errors: dict[int, DmakitError]) -> None:
    """What did not fail is on the medium."""
    for lba in sent.keys() - errors.keys():
        assert w.space.read(lba, 1) == sent[lba]


@everywhere
@pytest.mark.parametrize("kind", HEALED)
def test_a_crash_or_a_lie_loses_nothing(platform: str, kind: str) -> None:
    with world(platform, **broken(Fault(kind, at=STRUCK))) as w, w.open(timeout=0.2) as controller:
        sent, errors = write_eight(controller)
        assert errors == {} and len(controller.driver.recovery.incidents) == 1
        assert controller.driver.recovery.resets == 1
        check_medium(w, sent, errors)


@everywhere
@pytest.mark.parametrize("kind", TOLD)
def test_a_command_that_fails_or_never_ends_is_that_command_alone(platform: str, kind: str) -> None:
    fault = Fault(kind, at=STRUCK, value=int(Status.WRITE_FAULT))
    with world(platform, **broken(fault)) as w, w.open(timeout=0.2) as controller:
        sent, errors = write_eight(controller)
        assert list(errors) == [8 * STRUCK]
        with pytest.raises(DmakitError, match=TOLD[kind]):
            raise errors[8 * STRUCK]
        check_medium(w, sent, errors)


@everywhere
def test_an_unplugged_controller_says_so_and_everything_is_given_back(platform: str) -> None:
    with world(platform, **broken(Fault("unplugged", at=STRUCK))) as w, w.open(timeout=0.2) as controller:
        sent, errors = write_eight(controller)
        assert list(errors) == [8 * at for at in range(STRUCK, 8)]
        for error in errors.values():
            with pytest.raises(
                ControllerError, match=r"every register reads all ones: the device is unplugged or does"
            ):
                raise error
        check_medium(w, sent, errors)


@everywhere
def test_a_controller_that_is_never_ready_is_not_opened(platform: str) -> None:
    text = r"^enable: no answer within 0.5 s; CC=0x00460001 CSTS=0x00000000 "
    with world(platform, **broken(Fault("never-ready", count=99))) as w, pytest.raises(ControllerError, match=text):
        w.open()


@everywhere
def test_a_controller_that_does_not_stop_loses_its_bus_mastering(platform: str) -> None:
    with world(platform, **broken(Fault("never-disables", count=0))) as w:
        controller = w.open(timeout=0.2)
        model: Any = w.model(controller)
        write_eight(controller)
        assert w.masters_the_bus(model)
        model.faults = [Fault("never-disables", count=99)]
        controller.close()
        assert not w.masters_the_bus(model)


def test_every_fault_is_tried() -> None:
    here = {*HEALED, *TOLD, "unplugged", "never-ready", "never-disables"}
    assert here | {"late", "slow-ready"} == set(FAULTS)

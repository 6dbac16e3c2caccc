"""Traces of real drivers, call by call: every invalidation explained, every scatterlist and bounce slot equal."""

import lzma
from pathlib import Path

import pytest

from dmakit.trace.call_replay import CallsResult, replay_calls
from dmakit.trace.calls import Call, _inferred, read_calls
from dmakit.trace.columns import load

DATA = Path(__file__).parent.parent / "data" / "kernel-traces"
INVALIDATIONS = {
    "inval-lazy-smp1": {"flush queue timer": 23},
    "inval-strict-smp1": {"unmap": 385, "destroy": 360},
    "inval-cm-smp1": {"map-side sync": 752, "unmap": 385, "destroy": 360},
    "fresh-strict-smp2": {"unmap": 277, "destroy": 158},  # no boot file: the domains are made inside the trace
    "sg-ahci": {"flush queue timer": 42},
    "untrusted-nvme-smp1": {"destroy": 319, "unmap": 76},
    "untrusted-nvme-trusted-smp1": {"flush queue timer": 23},
}


def trace(name: str) -> Path:
    return DATA / f"{name}.trace.txt.xz"


def check(result: CallsResult, name: str) -> None:
    assert result.equal, result.render()
    assert result.malformed_lines == 0
    assert result.unknown_mappings == 0
    assert result.iovas_adopted <= 5  # an interrupt fell between the search and its probe
    inv = result.invalidations
    assert inv.causes == INVALIDATIONS[name]
    assert inv.explained == inv.descriptors == sum(inv.causes.values())
    for stream in result.streams.values():
        assert stream.kernel == stream.ours == stream.equal


@pytest.mark.parametrize("name", INVALIDATIONS)
def test_every_descriptor_is_explained_and_ours_emits_the_same_list(name: str) -> None:
    result = replay_calls(trace(name))
    check(result, name)
    if name == "sg-ahci":
        lists = result.scatterlists
        assert (lists.lists, lists.complete, lists.complete_equal) == (602, 403, 403)
        assert (lists.inferred, lists.inferred_equal) == (195, 195)
    if name == "untrusted-nvme-smp1":
        assert {stream: result.streams[stream].equal for stream in ("blink", "tblmap", "tblunmap")} == {
            "blink": 580,
            "tblmap": 636,
            "tblunmap": 636,
        }


@pytest.mark.parametrize("name", ["smp1-lazy", "smp1-strict"])
def test_single_cpu_fio_traces_replay_call_by_call(name: str) -> None:
    result = replay_calls(trace(name))
    assert result.equal, result.render()
    assert "qi" not in result.streams
    assert "the trace has no qi_submit events" in result.render()


@pytest.mark.parametrize("name", ["smp2-cm", "smp2-lazy", "smp2-lazy-mono"])
def test_on_several_cpus_only_the_order_of_frees_may_differ(name: str) -> None:
    result = replay_calls(trace(name))
    for what, stream in result.streams.items():
        assert what == "ff_in" or stream.kernel == stream.ours == stream.equal, result.render()


def test_another_maximum_segment_size_gives_other_scatterlists() -> None:
    result = replay_calls(trace("sg-ahci"), max_segment=32 << 10)
    assert not result.equal
    lists = result.scatterlists
    assert lists.inferred_equal < lists.inferred
    assert lists.first is not None
    assert lists.first["ours"] != lists.first["kernel"]


def test_without_the_defect_slots_are_released_after_the_unmap_and_the_same_ones() -> None:
    """The order of events of one kind does not show it; the slots themselves are the kernel's either way."""
    assert replay_calls(trace("untrusted-nvme-smp1"), defects=()).equal


def test_a_descriptor_changed_in_the_trace_is_found(tmp_path: Path) -> None:
    text = lzma.decompress(trace("inval-strict-smp1").read_bytes()).decode()
    at = text.index("iotlb_inv dmar0: 0x400f2 ")
    end = text.index("\n", at)
    line = text[at:end]
    path = tmp_path / "inval-strict-smp1.trace.txt"
    path.write_text(text[:at] + line.replace("40 0x0 0x0", "00 0x0 0x0") + text[end:])
    result = replay_calls(path, boot=DATA / "inval-strict-smp1.boot.txt")
    inv = result.invalidations
    assert inv.explained == inv.descriptors - 1
    assert result.streams["qi"].first is not None
    assert not result.equal


def test_calls_are_placed_where_they_take_effect() -> None:
    found = read_calls(trace("inval-cm-smp1"))
    kinds = [call.kind for call in found.calls]
    assert kinds.count("try") == kinds.count("sync") == kinds.count("destroy") == 360
    assert kinds.count("map") == kinds.count("unmap") == 385
    assert found.caching_mode
    assert found.other_descriptors == 11  # interrupt-remapping entries


def test_what_a_device_causes_by_changing_its_domain_is_no_calls() -> None:
    found = read_calls(trace("fresh-strict-smp2"))
    assert found.attached == ("0000:00:04.0", "0000:00:05.0")
    descriptors = load(trace("fresh-strict-smp2")).table("qi_submit")
    assert found.other_descriptors == len(descriptors.seq) - 435
    assert found.other_descriptors > 8  # four for each device that left a domain twice, and interrupt remapping


def test_lengths_of_a_chained_list_are_inferred_from_its_maps() -> None:
    maps = [(0x10000, 0x3000), (0x40000, 0x1000)]
    entries = [0x10200, 0x11000, 0x12000, 0x40000]
    assert _inferred(entries, maps, 0xE00 + 0x2000 + 0x200) == [
        (0x10200, 0xE00),
        (0x11000, 0x1000),
        (0x12000, 0x1000),
        (0x40000, 0x200),
    ]
    assert _inferred(entries, maps, 0x10) == []
    assert _inferred([0x90000], maps, 0x1000) == []


def test_a_call_gives_its_numbers_by_name() -> None:
    assert Call("map", 1, 0, "d", {"phys": 7})["phys"] == 7


def test_without_a_boot_trace_every_invalidation_is_still_the_kernels(tmp_path: Path) -> None:
    path = tmp_path / "alone.trace.txt.xz"
    path.write_bytes((DATA / "inval-lazy-smp1.trace.txt.xz").read_bytes())
    result = replay_calls(path)
    assert result.invalidations.explained == result.invalidations.descriptors == 23 and result.equal

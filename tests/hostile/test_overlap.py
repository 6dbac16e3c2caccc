"""Arrays of one call that overlap: what a batch call writes must not, what it only reads may.

Every array of a call is laid at a drawn place of one pool. Where an array that the call writes has a word in common
with another, the call is refused and nothing has changed. Otherwise it answers, and leaves the arrays, as it does with
a copy of each array of its own, on a machine of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmakit.dma import batch
from dmakit.errors import DmakitError, MisuseError
from dmakit.iommu.bitmap import Bitmap
from tests.hostile.variants import Late
from tests.hostile.world import PAGE, World

Arrays = dict[str, memoryview]
POOL = 512
BELOW = 1 << 31


@dataclass(frozen=True)
class Batch:
    """One batch call: the object it is made on, the ordinary words of its arrays, which of them it writes."""

    part: str
    words: Callable[[World], dict[str, list[int]]]
    written: tuple[str, ...]
    call: Callable[[World, Arrays], Any]


def _pages(world: World, *numbers: int) -> list[int]:
    return [world.part("phys") + number * PAGE for number in numbers]


def _three(world: World) -> dict[str, list[int]]:
    return {"phys": _pages(world, 4, 6, 9), "sizes": [PAGE] * 3}


def _requests(world: World) -> dict[str, list[int]]:
    ranges = {"addrs": _pages(world, 4, 6, 9), "lengths": [PAGE] * 3, "bounds": [0, 1, 3]}
    return {**ranges, "pointers": [1, 2, 3, 4], "chains": [5, 6]}


def _answers(world: World) -> dict[str, list[int]]:
    return {"bounds": [1, 2, 3], "statuses": [5, 6]}


def _map_windows(world: World, a: Arrays) -> Any:
    return world.part("Device").map_windows(a["phys"], a["sizes"], a["bounds"], a["states"], 0)


def _domain_rows(world: World) -> dict[str, list[int]]:
    return {"iovas": [BELOW, BELOW + PAGE, BELOW + 8 * PAGE], **_three(world)}


BATCHES = {
    "IovaDomain.alloc_batch": Batch(
        "IovaDomain",
        lambda w: {"sizes": [1, 2, 3, 40], "pfns": [7, 8, 9, 10]},
        ("pfns",),
        lambda w, a: w.part("IovaDomain").alloc_batch(a["sizes"], 0xFFFFF, a["pfns"]),
    ),
    "IovaDomain.free_batch": Batch(
        "IovaDomain",
        lambda w: {"pfns": [0, 0, 0], "sizes": [1, 2, 3]},
        (),
        lambda w, a: w.part("IovaDomain").free_batch(a["pfns"], a["sizes"]),
    ),
    "SharedDomain.alloc_batch": Batch(
        "SharedDomain",
        lambda w: {"sizes": [1, 2, 3, 40], "pfns": [7, 8, 9, 10]},
        ("pfns",),
        lambda w, a: w.part("SharedDomain").alloc_batch(a["sizes"], 0xFFFFF, a["pfns"]),
    ),
    "dma.batch.map_many": Batch(
        "Device",
        lambda w: {**_three(w), "out": [1, 2, 3, 4]},
        ("out",),
        lambda w, a: batch.map_many(w.part("Device"), a["phys"], a["sizes"], a["out"], 0),
    ),
    "dma.batch.link_many": Batch(
        "IovaState",
        lambda w: {"phys": _pages(w, 4, 6), "sizes": [PAGE, PAGE]},
        (),
        lambda w, a: batch.link_many(w.part("IovaState"), a["phys"], a["sizes"], 0, offset=2 * PAGE),
    ),
    "dma.batch.sync_many": Batch(
        "IovaState",
        lambda w: {"offsets": [0, PAGE], "sizes": [PAGE, PAGE]},
        (),
        lambda w, a: batch.sync_many(w.part("IovaState"), a["offsets"], a["sizes"]),
    ),
    "dma.batch.unlink_many": Batch(
        "IovaState",
        lambda w: {"offsets": [0, PAGE], "sizes": [PAGE, PAGE]},
        (),
        lambda w, a: batch.unlink_many(w.part("IovaState"), a["offsets"], a["sizes"], 0),
    ),
    "Device.map_window": Batch(
        "Device", _three, (), lambda w, a: w.part("Device").map_window(a["phys"], a["sizes"], 0).size_word
    ),
    "Device.map_windows": Batch(
        "Device", lambda w: {**_three(w), "bounds": [0, 1, 3], "states": [0, 0, 0, 0]}, ("states",), _map_windows
    ),
    "PageTableDomain.map_many": Batch(
        "PageTableDomain",
        _domain_rows,
        (),
        lambda w, a: w.part("PageTableDomain").map_many(a["iovas"], a["phys"], a["sizes"], 3),
    ),
    "PageTableDomain.unmap_many": Batch(
        "PageTableDomain",
        lambda w: {"iovas": [1 << 30, (1 << 30) + 2 * PAGE], "sizes": [PAGE, PAGE]},
        (),
        lambda w, a: w.part("PageTableDomain").unmap_many(a["iovas"], a["sizes"]),
    ),
    "PageTableDomain.iova_to_phys_many": Batch(
        "PageTableDomain",
        lambda w: {"iovas": [(1 << 30) + 5, BELOW, (1 << 30) + PAGE], "out": [1, 2, 3]},
        ("out",),
        lambda w, a: w.part("PageTableDomain").iova_to_phys_many(a["iovas"], a["out"]),
    ),
    "IommuUnit.translate_many": Batch(
        "PageTableDomain",
        lambda w: w.part("IommuUnit") and {"iovas": [(1 << 30) + 5, BELOW, (1 << 30) + PAGE], "out": [1, 2, 3]},
        ("out",),
        lambda w, a: w.part("IommuUnit").translate_many(w.part("PageTableDomain").did, a["iovas"], a["out"]),
    ),
    "PrpWriter.build_batch": Batch(
        "PrpWriter",
        _requests,
        ("pointers", "chains"),
        lambda w, a: w.part("PrpWriter").build_batch(*a.values()),
    ),
    "SglWriter.build_batch": Batch(
        "SglWriter",
        _requests,
        ("pointers", "chains"),
        lambda w, a: w.part("SglWriter").build_batch(*a.values()),
    ),
    "DescriptorReader.read_batch": Batch(
        "DescriptorReader",
        lambda w: {"forms": [0, 1], "pointers": _pages(w, 4, 6, 9, 10), "sizes": [8192, 512], **_answers(w)},
        ("bounds", "statuses"),
        lambda w, a: [view.tolist() for view in w.part("DescriptorReader").read_batch(*a.values(), to_host=True)],
    ),
    "RowMapper.map_many": Batch(
        "RowMapper",
        lambda w: {
            "directions": [1, 2],
            "cpus": [0, 0],
            "phys": _pages(w, 4, 6, 9),
            "lengths": [PAGE] * 3,
            "bounds": [0, 1, 3],
            "rows": [7] * 32,
        },
        ("rows",),
        lambda w, a: w.part("RowMapper").map_many(*a.values()),
    ),
    "Ring.submit": Batch(
        "Ring",
        lambda w: {"lbas": [0, 8], "counts": [8, 8], "low": [PAGE, PAGE], "high": [0, 0], "tags": [1, 2]},
        (),
        lambda w, a: w.part("Ring").submit(2, 1, a["lbas"], a["counts"], a["low"], a["high"], a["tags"]),
    ),
    "Ring.reap": Batch(
        "Ring",
        lambda w: {"slots": [0, 0], "tags": [1, 1], "statuses": [2, 2], "results": [3, 3]},
        ("slots", "tags", "statuses", "results"),
        lambda w, a: w.part("Ring").reap(a["slots"], a["tags"], a["statuses"], a["results"]),
    ),
    "Bitmap.set_many": Batch(
        "machine",
        lambda w: {"bitmap": [6, 5, 0, 70], "pages": [3, 64, 255]},
        ("bitmap",),
        lambda w, a: Bitmap(256, a["bitmap"]).set_many(a["pages"]),
    ),
    "Bitmap.merge": Batch(
        "machine",
        lambda w: {"bitmap": [6, 5, 0, 70], "other": [1, 0, 8, 2]},
        ("bitmap",),
        lambda w, a: Bitmap(256, a["bitmap"]).merge(Bitmap(256, a["other"])),
    ),
    "Bitmap.take": Batch(
        "machine",
        lambda w: {"bitmap": [6, 5, 0, 70], "other": [1, 0, 8, 2]},
        ("bitmap", "other"),
        lambda w, a: Bitmap(256, a["bitmap"]).take(Bitmap(256, a["other"])),
    ),
    "Bitmap.scan_pages": Batch(
        "machine",
        lambda w: {"bitmap": [6, 5, 0, 70], "out": [1] * 64},
        ("out",),
        lambda w, a: Bitmap(256, a["bitmap"]).scan_pages(a["out"]),
    ),
    "Bitmap.scan_runs": Batch(
        "machine",
        lambda w: {"bitmap": [6, 5, 0, 70], "out": [1] * 66},
        ("out",),
        lambda w, a: Bitmap(256, a["bitmap"]).scan_runs(a["out"]),
    ),
}


def ended(world: World, made: Batch, arrays: Arrays) -> tuple[str, Any]:
    """What a call answered, or how it was refused."""
    try:
        return "answer", made.call(world, arrays)
    except DmakitError as error:
        return type(error).__name__, str(error)


def overlapping(made: Batch, places: dict[str, range]) -> list[tuple[str, str]]:
    """(written array, another) of each pair that has a word in common."""
    pairs = ((one, other) for one in made.written for other in places if other != one)
    return [(a, b) for a, b in pairs if set(places[a]) & set(places[b])]


@pytest.mark.parametrize("name", BATCHES)
@settings(max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_written_arrays_overlap_nothing_and_read_ones_may(name: str, data: st.DataObject) -> None:
    made, world = BATCHES[name], World()
    world.part(made.part)
    ordinary = made.words(world)
    pool = memoryview(array("Q", [0] * POOL))
    places = {}
    for key, values in ordinary.items():
        first = data.draw(st.sampled_from((0, 1, 2, 3, 4, 80, 160, 240, 320)), label=key)
        places[key] = range(first, first + len(values))
        pool[first : first + len(values)] = memoryview(array("Q", values))
    arrays = {key: pool[place.start : place.stop] for key, place in places.items()}
    twin, copies = World(), {key: memoryview(array("Q", view.tolist())) for key, view in arrays.items()}
    twin.part(made.part)
    made.words(twin)
    before, words = world.state(), pool.tolist()
    found, alone = ended(world, made, arrays), ended(twin, made, copies)
    pairs = overlapping(made, places)
    if pairs:
        rules = [f"{one}: is written, and must not overlap {other}" for one, other in pairs]
        assert found in [("MisuseError", rule) for rule in rules] or (found == alone and found[0] == "MisuseError")
        assert (world.state(), pool.tolist()) == (before, words)
        return
    assert found == alone
    assert {key: view.tolist() for key, view in arrays.items()} == {key: view.tolist() for key, view in copies.items()}
    assert world.state() == twin.state()


@pytest.mark.parametrize("name", [name for name, made in BATCHES.items() if made.written])
def test_the_same_array_twice_is_refused_by_name(name: str) -> None:
    made, world = BATCHES[name], World()
    world.part(made.part)
    ordinary = made.words(world)
    one = made.written[-1]
    for other in set(ordinary) - {one}:
        arrays = {key: memoryview(array("Q", values)) for key, values in ordinary.items()}
        longer = max(arrays[one], arrays[other], key=len)
        arrays[one] = longer[: len(arrays[one])]
        arrays[other] = longer[: len(arrays[other])]
        before = world.state()
        with pytest.raises(MisuseError, match=f"^({one}: is written, and must not overlap {other}|{other}: .* {one})$"):
            made.call(world, arrays)
        assert world.state() == before


def test_a_bitmap_merged_with_itself_stays_as_it_is() -> None:
    bitmap = Bitmap(256, array("Q", [6, 5, 0, 70]))
    bitmap.merge(bitmap)
    assert bitmap.words.tolist() == [6, 5, 0, 70]


@pytest.mark.parametrize("call", [batch.sync_many, batch.unlink_many, batch.link_many])
def test_numbers_are_asked_for_their_values_before_ranges_are_checked(call: Any) -> None:
    world = World()
    state, mapped = world.part("IovaState"), world.part("mapped")
    first, sizes = array("Q", [2 * PAGE, 3 * PAGE]), array("Q", [PAGE, PAGE])
    before = world.state()

    def leave() -> None:  # the window, for the neighbour's
        first[1], sizes[1] = mapped - state.addr & (1 << 64) - 1, 1 << 40

    with pytest.raises(MisuseError, match="outside the window|wraps"):
        if call is batch.link_many:
            batch.link_many(state, first, sizes, 0, offset=Late(0, leave))  # type: ignore[arg-type]
        else:
            call(state, first, sizes, *((0,) if call is batch.unlink_many else ()), cpu=Late(0, leave))
    assert world.state() == before

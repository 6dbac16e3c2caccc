"""The generated C: no Python in the functions that are declared to need none.

Whatever a ``.pxd`` declares ``nogil`` is an inner loop or is called from one. Cython refuses most Python operations
there, but not all: an untyped value that is handed to a typed view inside ``with nogil`` is converted without the GIL,
in silence, and a plain import of a compiled class turns its calls into Python's. So the C is read: a function that
does not take the GIL itself (to note an event) may call nothing of Python's API. The exit on which a C function adds
itself to a traceback does not count, nor does the refusal of None: neither is reached unless something is wrong.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import pytest

from dmakit import _core

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = re.compile(r"^@cython\.cfunc[^\n]*\n(?:@[^\n]*\n)*@cython\.nogil\n(?:@[^\n]*\n)*def (\w+)\(", re.M)
HEADER = re.compile(r"^\w[^\n;]*?\b(\w+)\(.*\) \{$")
CLASS = re.compile(r"^cdef class (\w+)(?:\((\w+)\))?", re.M)
DECLARED = re.compile(r"^(\s*)cp?def\s+(?!class\b|enum\b|extern\b)[^(=\n]*?(\w+)\((.*?)\)([^()\n]*)$", re.S | re.M)
CALL = re.compile(r"\b(_?Py[A-Z_]\w*|__Pyx_\w+|__PYX_XCLEAR_MEMVIEW)\s*\(")
HARMLESS = {
    "__Pyx_MemoryView_Len",
    "__Pyx_RefNannySetupContext",
    "__Pyx_RefNannyFinishContext",
    "__Pyx_FastGIL_Remember",
    "__Pyx_FastGIL_Forget",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
    "__Pyx_ErrOccurredWithGIL",  # asked only when the answer is the one that stands for an exception
}
TAKES_THE_GIL = "PyGILState_Ensure"
ERROR_EXIT = re.compile(r"__pyx_L1_error:;")
NONE_CHECK = re.compile(r"if \(unlikely\([^\n]*== Py_None\)\) \{.*?\n\s*\}", re.S)
HOT = {
    "dma.core": {
        "_bounce_in",
        "_bounce_out",
        "_bounce_sync",
        "_alloc_iova",
        "_free_iova",
        "_remember",
        "_release_remembered",
    },
    "dma.streaming": {"_map_phys", "_unmap_phys", "_sync_single", "_iommu_map", "_iommu_unmap", "_direct_bounce"},
    "dma.scatter": {
        "_map_sg",
        "_unmap_sg",
        "_sync_sg",
        "_map_each",
        "_map_merged",
        "_map_runs",
        "_layout",
        "_finalise",
    },
    "dma.batch": {"_bytes", "_beyond"},
    "dma.window": {
        "_link",
        "_link_pieces",
        "_fill_pieces",
        "_table_of",
        "_room",
        "_sync",
        "_unlink",
        "_remove",
        "_destroy",
    },
    "dma.windows": {"_total", "_ascending"},
    "swiotlb.bounce": {"_map", "_unmap", "_sync", "_bounce", "_claim", "_contains", "_zero_pads"},
    "swiotlb.pool": {"_search", "_take", "_place", "_release", "_copy_slots"},
    "iommu.bitmap": {"_count", "_merge", "_take", "_clear", "_emit", "_thin", "_thin_edges"},
    "iommu.granularity": {"_coarsen", "_refine", "_down", "_up", "_coarsen_words", "_refine_words"},
    "iommu.caches": {"_find", "_insert", "_renew", "_drop", "_drop_all", "_drop_domain", "_drop_range", "_scan"},
    "iommu.devtlb": {"_lookup", "_fill", "_invalidate"},
    "iommu.dirty": {"_run", "_scan", "_record"},
    "iommu.domain": {"_map", "_unmap", "_flush", "_invalidate", "_iova_to_phys", "_undo_map"},
    "iommu.formats.base": {"_leaf_bits", "_is_leaf", "_fill"},
    "iommu.gather": {"_init", "_add_range", "_is_empty"},
    "iommu.invalidation": {"_push", "_submit", "_next", "_range_high", "_devtlb_high"},
    "iommu.iotlb": {"_lookup"},
    "iommu.lane": {
        *("_run", "_block", "_ask", "_once", "_any", "_cached", "_walked", "_find_top", "_below", "_leaf", "_keep"),
        *("_holds_8", "_holds_4", "_fill", "_fill_table", "_renew_top", "_replace_table", "_way", "_account"),
    },
    "iommu.pagetable": {
        *("_map", "_map_near", "_map_runs", "_put", "_put_pages", "_make_room", "_write"),
        *("_unmap", "_unmap_in", "_clear_leaves", "_leaves_from"),
    },
    "iommu.psc": {"_deepest", "_remember"},
    "iommu.tables": {"_new_around", "_defer", "_free_list"},
    "iommu.translation": {"_translate", "_translate_ats", "_resolve"},
    "iommu.tree": {"_leaf", "_slot", "_iova_to_phys", "_link", "_leaf_across"},
    "iommu.unit": {"_flush_range", "_sync_range", "_push", "_submit"},
    "iommu.walker": {"_walk", "_leaf"},
    "iova.allocator": {
        *("_alloc_fast", "_alloc_near", "_free_fast", "_alloc_many", "_cached_run", "_free_many"),
        *("_alloc", "_free", "_drain", "_flush_rcaches"),
    },
    "iova.flush_queue": {"_queue", "_free_flushed", "_flush_iotlb", "_sweep"},
    "iova.magazine": {"_push", "_pop", "_look", "_pop_run", "_push_run", "_new", "_release"},
    "iova.rcache": {"_get", "_put", "_get_run", "_put_run", "_depot_pop"},
    "iova.search": {"_place", "_inserted", "_removing", "_alloc", "_remove", "_walk", "_find_limit"},
    "iova.shared": {"_alloc_one", "_free_one", "_alloc_many", "_free_many", "_enter", "_leave", "_settle"},
    "iova.tree": {"_find", "_first_ending_at", "_insert_before", "_remove", "_take"},
    "trace.rows": {"_hash", "_name", "_to_columns"},
    "trace.scanner": {"_number", "_stamp", "_digits", "_task", "_kind", "_fields", "_line", "_put", "_scan"},
    "bench.native": {"_fill", "_walk"},
    "iommu.port": {"_take", "_touch"},
    "block.dma_iter": {"_begin", "_next", "_merge_boundary", "_start_window", "_link_window", "_one"},
    "block.request": {"_measure", "_may_coalesce"},
    "block.segments": {"_next", "gap_between", "segment_room", "mergeable"},
    "nvme.iod": {"_keep"},
    "nvme.mapping": {
        "_map_data",
        "_map_simple",
        "_write_prps",
        "_write_sgl",
        "_save",
        "_unmap_data",
        "_unmap_listed",
        "_unmap_one",
        "_destroy_window",
        "_choice",
    },
    "nvme.ring": {"_slot", "_next", "_look", "_drop", "_put", "_submit", "_reap", "_ring_mapped", "_tell_mapped"},
    "nvme.rows": {"_map_one", "_store", "_load", "_keep", "_known", "_recall", "_wrong"},
    "nvme.fetch": {"_read", "_read_prps", "_read_sgl", "_fetch", "_add"},
    "nvme.lists": {"_first", "_further", "_at", "_drop"},
    "nvme.pool": {"_alloc", "_free", "_free_chain", "_held"},
    "nvme.prp": {"_begin", "_feed", "_pages", "_open", "_chain", "_link", "_build", "_entry", "_want", "_list", "_run"},
    "nvme.sgl": {"_begin", "_feed", "_finish", "_look", "_build", "_descriptor", "_point", "_data", "_part", "_append"},
}


TYPED = {
    "trace.branch": {"change"},
    "trace.operations": {"_value"},
    "trace.search": {"order_of", "_span", "_alloc"},
}
LET_GO = re.compile(r"__Pyx_FastGIL_Remember\(\);(.*?)__Pyx_FastGIL_Forget", re.S)
BATCHES = {  # the functions in which a batch call lets go of the GIL
    "dma.batch": {"_link_run", "_map_run", "_unmap_run", "_sync_run", "_window_run"},
    "dma.scatter": {"_sg_run"},
    "dma.windows": {"map_windows", "unmap_windows"},
    "iommu.bitmap": {"_set_many", "_scan_pages", "_scan_runs", "merge", "take", "clear", "count"},
    "iommu.dirty": {"run"},
    "iommu.domain": {"_map_many", "_unmap_many", "_iova_to_phys_many"},
    "iommu.granularity": {"_convert"},
    "iommu.space": {"_map_undisturbed", "_unmap_undisturbed"},
    "iommu.translation": {"_translate_many"},
    "iova.domain": {"_alloc_words", "_free_words"},
    "iova.shared": {"_alloc_words", "_free_words"},
    "nvme.fetch": {"_run"},
    "nvme.lists": {"_build_run", "_drop_run"},
    "nvme.rows": {"_map_run", "_unmap_run"},
    "trace.scanner": {"scan"},
}
ROOMS = ("dmakit.iova", "dmakit.iommu", "dmakit.swiotlb", "dmakit.dma")
LOOP_OF = {
    "dma.batch.link_many": ("_link_run",),
    "dma.batch.map_many": ("_map_run", "_unmap_run"),
    "dma.batch.sync_many": ("_window_run",),
    "dma.batch.sync_many_for_cpu": ("_sync_run",),
    "dma.batch.sync_many_for_device": ("_sync_run",),
    "dma.batch.unlink_many": ("_window_run",),
    "dma.batch.unmap_many": ("_unmap_run",),
    "dma.windows.map_windows": ("map_windows",),
    "dma.windows.unmap_windows": ("unmap_windows",),
    "iommu.bitmap.scan_pages": ("_scan_pages",),
    "iommu.bitmap.scan_runs": ("_scan_runs",),
    "iommu.bitmap.set_many": ("_set_many",),
    "iommu.domain.iova_to_phys_many": ("_iova_to_phys_many",),
    "iommu.domain.map_many": ("_map_many", "_unmap_many"),
    "iommu.domain.unmap_many": ("_unmap_many",),
    "iommu.translation.translate_many": ("_translate_many",),
    "iova.domain.alloc_batch": ("_alloc_words",),
    "iova.domain.free_batch": ("_free_words",),
    "iova.shared.alloc_batch": ("_alloc_words",),
    "iova.shared.free_batch": ("_free_words",),
}


def generated(module: str) -> str:
    """The C of a module; when it was not generated here from this source, CI fails and a newcomer's run skips."""
    path = ROOT / "build" / "cython" / "src" / Path(*module.split(".")).with_suffix(".c")
    if not path.exists() or _core.recorded_digests().get(module) != _core.source_digest(module):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no C of this source here (./dmakit build)")
    return path.read_text()


def declarations(module: str) -> list[tuple[str, str]]:
    """(class or "", name) of the functions that the module declares nogil: in its .pxd, or in its .py by decorators."""
    source = _core.source_of(module)
    path = source.with_suffix(".pxd")
    text = path.read_text() if path.exists() else ""
    found = [("", name) for name in PRIVATE.findall(source.read_text())]
    for match in DECLARED.finditer(text):
        if "nogil" in match.group(4):
            inside = match.group(1).strip("\n")
            found.append((CLASS.findall(text[: match.start()])[-1][0] if inside else "", match.group(2)))
    return found


@cache
def methods() -> dict[str, set[str]]:
    """By class, the methods that it or a class above it declares nogil: an override is declared nowhere again."""
    own: dict[str, set[str]] = {}
    above: dict[str, str] = {}
    for module in _core.COMPILED_MODULES:
        path = _core.source_of(module).with_suffix(".pxd")
        if path.exists():
            above |= dict(CLASS.findall(path.read_text()))
        for owner, name in declarations(module):
            own.setdefault(owner, set()).add(name)
    inherited: dict[str, set[str]] = {}
    for name in above:
        line = name
        while line:
            inherited.setdefault(name, set()).update(own.get(line, ()))
            line = above.get(line, "")
    return inherited


def declared(module: str) -> list[tuple[str, str]]:
    """(mangled name, name) of the functions of a module that need no GIL."""
    prefix = "__pyx_f_" + "_".join(f"{len(part)}{part}" for part in module.split("."))
    path = _core.source_of(module).with_suffix(".pxd")
    classes = [name for name, _ in CLASS.findall(path.read_text())] if path.exists() else []
    found = [(f"{prefix}_{name}", name) for owner, name in declarations(module) if not owner]
    for owner in classes:
        found += [(f"{prefix}_{len(owner)}{owner}_{name}", name) for name in sorted(methods()[owner])]
    return found


def bodies(code: str) -> dict[str, str]:
    """C function name to its body, comments and lines of the preprocessor taken out."""
    code = re.sub(r"/\*.*?\*/", "", code, flags=re.S)
    code = re.sub(r"^[ \t]*#.*$", "", code, flags=re.M)
    found: dict[str, str] = {}
    name, lines, depth = "", [], 0
    for line in code.splitlines():
        if depth == 0:
            header = HEADER.match(line)
            name, lines, depth = (header.group(1), [], 1) if header else ("", [], 0)
            continue
        depth += (line == "{") - line.startswith("}")  # a slice of a view is a block of its own at the margin
        if depth == 0:
            found[name] = "\n".join(lines)
        lines.append(line)
    return found


def when_all_is_well(body: str) -> str:
    """A function's body without what is reached only with an exception."""
    return NONE_CHECK.sub("", ERROR_EXIT.split(body)[0])


@pytest.mark.parametrize("module", _core.COMPILED_MODULES)
def test_functions_without_the_gil_call_nothing_of_pythons(module: str) -> None:
    found = bodies(generated(module))
    wrong: dict[str, set[str]] = {}
    for mangled, name in declared(module):
        body = found.get(mangled)
        if body is None:
            continue
        body = when_all_is_well(body)
        if TAKES_THE_GIL in body:
            continue
        calls = set(CALL.findall(body)) - HARMLESS
        if calls:
            wrong[name] = calls
    assert not wrong


@pytest.mark.parametrize("module", _core.COMPILED_MODULES)
def test_nothing_is_converted_where_the_gil_was_let_go(module: str) -> None:
    code = generated(module)
    for block in re.findall(r"PyEval_SaveThread\(\);(.*?)/\*finally:\*/", code, re.S):
        assert "__Pyx_PyObject_to_MemoryviewSlice" not in block, block[:300]


@pytest.mark.parametrize("module", HOT)
def test_the_hot_functions_are_among_those_that_are_read(module: str) -> None:
    code = bodies(generated(f"dmakit.{module}"))
    names: dict[str, list[str]] = {}
    for mangled, name in declared(f"dmakit.{module}"):
        if mangled in code:
            names.setdefault(name, []).append(mangled)
    assert set(names) >= HOT[module]
    for name in HOT[module]:
        for mangled in names[name]:
            assert TAKES_THE_GIL not in when_all_is_well(code[mangled]), f"{name} takes the GIL"


@pytest.mark.parametrize("module", TYPED)
def test_typed_steps_that_keep_the_gil_call_nothing_of_pythons(module: str) -> None:
    code = bodies(generated(f"dmakit.{module}"))
    for name in TYPED[module]:
        found = [body for mangled, body in code.items() if re.fullmatch(rf"__pyx_f_\w+?_{name}", mangled)]
        assert found, f"{name}: no body found in the C"
        assert not set(CALL.findall(when_all_is_well(found[0]))) - HARMLESS, name


@pytest.mark.parametrize("module", BATCHES)
def test_every_batch_call_lets_go_of_the_gil(module: str) -> None:
    """A batch that kept it would work, and other threads would stand still: nobody would see it."""
    code = bodies(generated(f"dmakit.{module}"))
    for name in BATCHES[module]:
        found = [body for mangled, body in code.items() if re.fullmatch(rf"__pyx_(?:f|pf)_\w+?[_0-9]{name}", mangled)]
        assert found, f"{name}: no body found in the C"
        loops = [loop for body in found for loop in LET_GO.findall(body)]
        assert loops, f"{name} keeps the GIL"
        for loop in loops:
            assert not set(CALL.findall(when_all_is_well(loop))) - HARMLESS, name


def test_every_public_batch_call_is_among_them() -> None:
    """Names tell: ``…_many``, ``…_batch``, ``…_windows``, ``scan_…``; each is listed with its loops."""
    public: set[str] = set()
    for module in _core.COMPILED_MODULES:
        if not module.startswith(ROOMS):
            continue
        for line in re.findall(r"^(?:    )?def ([a-z]\w*)\(", _core.source_of(module).read_text(), re.M):
            if re.search(r"_many(_for_\w+)?$|_batch$|_windows$|^scan_", line):
                public.add(f"{module.removeprefix('dmakit.')}.{line}")
    assert public == set(LOOP_OF)
    for public_name, loops in LOOP_OF.items():
        module = public_name.rpartition(".")[0]
        assert set(loops) <= BATCHES[module], public_name

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
from pathlib import Path

import pytest

from dmakit import _core

ROOT = Path(__file__).resolve().parents[2]
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
    "dma.batch": {"_bytes"},
    "dma.window": {"_link_pieces", "_destroy"},
    "swiotlb.bounce": {"_map", "_unmap", "_sync", "_bounce", "_claim", "_contains", "_zero_pads"},
    "swiotlb.pool": {"_search", "_take", "_place", "_release", "_copy_slots"},
    "iommu.bitmap": {"_count", "_merge", "_take", "_clear", "_emit", "_thin", "_thin_edges"},
    "iommu.granularity": {"_coarsen", "_refine", "_down", "_up", "_coarsen_words", "_refine_words"},
    "iommu.dirty": {"_run", "_scan", "_record"},
    "bench.native": {"_fill", "_walk"},
    "iommu.pagetable": {"_map", "_unmap"},
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
    },
    "nvme.ring": {"_slot", "_next", "_look", "_drop", "_put", "_submit", "_reap", "_ring_mapped", "_tell_mapped"},
    "nvme.fetch": {"_read", "_read_prps", "_read_sgl", "_fetch", "_add"},
    "nvme.lists": {"_first", "_further", "_at", "_drop"},
    "nvme.pool": {"_alloc", "_free", "_free_chain", "_held"},
    "nvme.prp": {"_begin", "_feed", "_pages", "_open", "_chain", "_link", "_build", "_entry", "_want", "_list", "_run"},
    "nvme.sgl": {"_begin", "_feed", "_finish", "_look", "_build", "_descriptor", "_point", "_data", "_part", "_append"},
    "iommu.translation": {"_translate", "_resolve"},
    "iommu.tree": {"_leaf", "_slot"},
    "iova.rcache": {"_get", "_put"},
    "iova.tree": {"_find", "_insert_before", "_remove"},
    "trace.scanner": {"_number", "_stamp"},
}


def generated(module: str) -> str:
    """The C of a module; when it was not generated here from this source, CI fails and a newcomer's run skips."""
    path = ROOT / "build" / "cython" / "src" / Path(*module.split(".")).with_suffix(".c")
    if not path.exists() or _core.recorded_digests().get(module) != _core.source_digest(module):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no C of this source here (./dmakit build)")
    return path.read_text()


def declared(module: str) -> list[tuple[str, str]]:
    """(mangled name, name) of the functions that the module's .pxd declares nogil."""
    text = _core.source_of(module).with_suffix(".pxd").read_text()
    prefix = "__pyx_f_" + "_".join(f"{len(part)}{part}" for part in module.split("."))
    found: list[tuple[str, str]] = []
    for match in DECLARED.finditer(text):
        if "nogil" not in match.group(4):
            continue
        owner = ""
        if match.group(1).strip("\n"):
            owner = re.findall(r"^cdef class (\w+)", text[: match.start()], re.M)[-1]
            owner = f"_{len(owner)}{owner}"
        found.append((f"{prefix}{owner}_{match.group(2)}", match.group(2)))
    return found


def bodies(code: str) -> dict[str, str]:
    """C function name to its body, comments and lines of the preprocessor taken out."""
    code = re.sub(r"/\*.*?\*/", "", code, flags=re.S)
    code = re.sub(r"^[ \t]*#.*$", "", code, flags=re.M)
    return {
        m.group(1): m.group(2) for m in re.finditer(r"^\w[^\n;]*?\b(\w+)\([^\n]*\) \{\n(.*?)^\}", code, re.S | re.M)
    }


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


def test_the_batch_loops_of_mapping_calls_run_without_the_gil() -> None:
    code = bodies(generated("dmakit.dma.batch"))
    for name in ("_link_run", "_map_run", "_unmap_run"):
        loops = re.findall(
            r"__Pyx_FastGIL_Remember\(\);(.*?)__Pyx_FastGIL_Forget", code[f"__pyx_f_6dmakit_3dma_5batch_{name}"], re.S
        )
        assert loops, f"{name} keeps the GIL"
        for loop in loops:
            assert not set(CALL.findall(loop)) - HARMLESS


@pytest.mark.parametrize("module", HOT)
def test_the_hot_functions_are_among_those_that_are_read(module: str) -> None:
    code = bodies(generated(f"dmakit.{module}"))
    names = {name: mangled for mangled, name in declared(f"dmakit.{module}")}
    assert set(names) >= HOT[module]
    for name in HOT[module]:
        assert names[name] in code, f"{name}: no body found in the C"
        assert TAKES_THE_GIL not in when_all_is_well(code[names[name]]), f"{name} takes the GIL"

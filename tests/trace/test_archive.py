"""Reading archives: the four kinds, and a clear error for what cannot be read."""

from __future__ import annotations

import gzip
import lzma
import re
from pathlib import Path

import pytest
import zstandard

from dmakit.errors import InputError
from dmakit.trace.archive import archive_kind, first_bytes, line_chunks, read_all
from dmakit.trace.columns import load

TEXT = b"".join(b"line %d\n" % i for i in range(5000))
PACK = {
    "plain": lambda text: text,
    "xz": lzma.compress,
    "gzip": gzip.compress,
    "zstd": lambda text: zstandard.ZstdCompressor().compress(text),
}


@pytest.mark.parametrize("kind", PACK)
def test_every_kind_is_told_by_its_bytes_and_read_in_whole_lines(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(PACK[kind](TEXT))
    assert archive_kind(path.read_bytes()) == kind
    chunks = list(line_chunks(path, size=777))
    assert b"".join(chunks) == TEXT == read_all(path)
    assert len(chunks) > 1 or kind == "zstd"  # zstd gives whole blocks, here one
    assert all(chunk.endswith(b"\n") for chunk in chunks)
    assert first_bytes(path, 10) == TEXT[:10]


def test_two_zstd_frames_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.zst"
    path.write_bytes(PACK["zstd"](TEXT) + PACK["zstd"](TEXT))
    assert read_all(path) == TEXT * 2


@pytest.mark.parametrize("kind", ["xz", "gzip", "zstd"])
def test_a_truncated_or_broken_archive_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "trace"
    packed = PACK[kind](TEXT)
    for broken in (packed[: len(packed) // 2], packed[:20] + b"\xff" * 40 + packed[60:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=re.escape(f"{path}: the archive is truncated or broken: ")):
            list(line_chunks(path))


def test_unreadable_empty_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with pytest.raises(InputError, match=re.escape(f"{path}: cannot be read: No such file or directory")):
        list(line_chunks(path))
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: cannot be read: Is a directory")):
        list(line_chunks(tmp_path))
    path.write_bytes(b"")
    with pytest.raises(InputError, match=re.escape(f"{path}: the file is empty")):
        list(line_chunks(path))
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(InputError, match=re.escape(f"{path}: the archive holds an empty file")):
        list(line_chunks(path))
    path.write_bytes(b"\x17\x08\x44tracing\x00\x00")
    with pytest.raises(InputError, match="neither text nor an xz, zstd or gzip archive"):
        list(line_chunks(path))


def test_text_without_any_known_event_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("hello\n  bash-1 [000] ..... 1.0: sched_switch: x\n")
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: no recognised event in 2 lines (1 of unknown events, 1 malformed lines (line 1: 'hello')); "
        "expected ftrace text, see: dmakit record --help"
    )

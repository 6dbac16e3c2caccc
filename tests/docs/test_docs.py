"""The documentation tells the truth: its code runs, its picture is from a run, its tables match the program."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dmakit
from dmakit.cli.main import VERBS, run
from dmakit.lab.profile import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = [(path, code) for path in PAGES for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)]


@pytest.mark.parametrize(("path", "code"), CODE, ids=[f"{path.name}-{i}" for i, (path, _) in enumerate(CODE)])
def test_python_examples_run(path: Path, code: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, str(path), "exec"), {})  # noqa: S102


def test_the_readmes_example_reads_what_was_written(capsys: Any) -> None:
    code = next(code for path, code in CODE if path.name == "README.md")
    exec(code, {})  # noqa: S102
    assert capsys.readouterr().out.splitlines() == ["b'hello, device'", "16"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_the_readmes_picture_is_from_a_run() -> None:
    check = subprocess.run([sys.executable, "tools/readme_picture.py", "--check"], cwd=ROOT, check=False)
    assert check.returncode == 0, "run: python tools/readme_picture.py"


def test_works_today_lists_the_verbs_of_help(capsys: Any) -> None:
    listed = re.findall(r"^\| `dmakit (\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert listed == list(VERBS)
    with pytest.raises(SystemExit):
        run(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {verb} " in shown for verb in listed)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself(verb: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        run([verb, "--help"])
    assert stop.value.code == 0 and f"usage: dmakit {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], ("numpy", "rich", "cython", "dmakit.lab")),
        (["vfio", "list"], ("numpy", "rich", "dmakit.lab", "dmakit.dma")),  # cython: the fail point's, interpreted
    ],
)
def test_what_needs_no_mapping_code_imports_nothing_heavy(words: list[str], heavy: tuple[str, ...]) -> None:
    code = f"import sys; from dmakit.cli.main import run\ntry: run({words})\nexcept SystemExit: pass\n"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.splitlines()[-1] == "[]"


def test_every_rate_of_the_profile_is_in_its_page() -> None:
    page = (ROOT / "docs" / "profiles.md").read_text()
    for rate in PUBLISHED.rates:
        for row in rate.rows:
            stem = row.rsplit("_", 1)[0]
            assert row in page or stem in page or row in ("table_flushes", "cache_clean_lines", "cache_inv_lines"), row


def test_the_feature_page_is_complete_and_current() -> None:
    check = subprocess.run(
        [sys.executable, "tools/gen_features.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, f"{check.stdout}run: python tools/gen_features.py"


def test_links_between_pages_lead_somewhere() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_public_names_can_be_imported() -> None:
    for name in dmakit.__all__:
        assert getattr(dmakit, name) is not None

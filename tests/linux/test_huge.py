"""Transparent huge pages of a machine's RAM: what the host's settings for shared memory give."""

from __future__ import annotations

import pytest

from dmakit.platform.huge_pages import SharedHuge, shared_huge
from tests.linux.worlds import host, machine

THP = "sys/kernel/mm/transparent_hugepage"
ALL, SIZE = f"{THP}/shmem_enabled", f"{THP}/hugepages-2048kB/shmem_enabled"
CASES = (  # all sizes, 2 MiB (None: an older kernel), mode, remedy
    ("always", None, "always", ""),
    ("within_size", None, "within_size", ""),
    ("advise", "inherit", "advise", ""),
    ("force", "inherit", "force", ""),
    ("never", None, "never", f"echo advise > /{ALL}"),
    ("never", "inherit", "never", f"echo advise > /{ALL}"),
    ("deny", "always", "deny", f"echo advise > /{ALL}"),
    ("never", "advise", "advise", ""),
    ("always", "never", "never", f"echo advise > /{SIZE}"),
    ("force", "always", "always", f"echo inherit > /{SIZE}"),
    (None, None, "", ""),
)


def files(every: str | None, own: str | None) -> dict[str, str]:
    found = {}
    if every is not None:
        words = ("always", "within_size", "advise", "never", "deny", "force")
        found[ALL] = " ".join(f"[{word}]" if word == every else word for word in words)
    if own is not None:
        words = ("always", "inherit", "within_size", "advise", "never")
        found[SIZE] = " ".join(f"[{word}]" if word == own else word for word in words)
    return found


@pytest.mark.parametrize("every, own, mode, remedy", CASES)
def test_what_the_settings_for_shared_memory_decide(every: str | None, own: str | None, mode: str, remedy: str) -> None:
    answer = shared_huge(files(every, own).get)
    assert answer == SharedHuge(mode, remedy) and answer.given == (bool(mode) and not remedy)


@pytest.mark.parametrize("every, own, mode, remedy", CASES)
@pytest.mark.parametrize("wanted", ("auto", "thp", "none"))
def test_a_machine_says_thp_only_where_the_host_gives_some(
    wanted: str, every: str | None, own: str | None, mode: str, remedy: str
) -> None:
    fake = host()
    fake.files.update({f"/{path}": text for path, text in files(every, own).items()})
    fake.files["/sys/kernel/mm/transparent_hugepage/enabled"] = "[always] madvise never"
    with machine("type1", fake, ram="2M", huge=wanted) as made:
        assert made.space.huge == ("thp" if wanted != "none" and mode and not remedy else "none")

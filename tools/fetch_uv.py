"""Fetch the uv binary from the Python package index into a folder, using nothing but the standard library.

A stock Debian or Ubuntu Python has neither pip nor ensurepip and refuses system-wide installs (PEP 668), so
the launcher cannot rely on them. The wheel is chosen for this machine, its SHA-256 is checked against the
index, and the one binary in it is written to FOLDER/uv.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import stat
import sys
import urllib.request
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

VERSION = "0.13.8"


def index() -> str:
    """The simple index to ask: the user's mirror if one is configured, else PyPI."""
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if os.environ.get(name):
            return os.environ[name].rstrip("/")
    return "https://pypi.org/simple"


def fits(filename: str) -> bool:
    """Whether a wheel's file name is for this machine's libc and processor."""
    libc = "manylinux" if platform.libc_ver()[0] == "glibc" else "musllinux"
    return (
        filename.startswith(f"uv-{VERSION}-") and filename.endswith(f"_{platform.machine()}.whl") and libc in filename
    )


def fetch(url: str, accept: str = "*/*") -> bytes:
    """The body of ``url``; OSError when it cannot be had."""
    request = urllib.request.Request(url, headers={"Accept": accept, "User-Agent": "dmakit-launcher"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        body: bytes = answer.read()
    return body


class Links(HTMLParser):
    """The hrefs of a simple index page (PEP 503: every index serves this form)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def main(folder: str) -> int:
    """Download, verify and unpack; returns the exit status."""
    page = f"{index()}/uv/"
    links = [urljoin(page, link) for link in Links(fetch(page, "text/html").decode()).found]
    wheels = [link for link in links if fits(link.partition("#")[0].rpartition("/")[2])]
    if not wheels:
        print(f"no uv {VERSION} wheel for {platform.machine()} on {index()}", file=sys.stderr)
        return 1
    url, _, fragment = wheels[-1].partition("#")
    body = fetch(url)
    digest = hashlib.sha256(body).hexdigest()
    if fragment != f"sha256={digest}":
        print(f"{url}: SHA-256 {digest} is not what the index says ({fragment or 'nothing'})", file=sys.stderr)
        return 1
    target = Path(folder, "uv")
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(body)) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".data/scripts/uv"))
        part = target.with_suffix(".part")
        part.write_bytes(wheel.read(member))
    part.chmod(part.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    part.replace(target)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except OSError as error:
        print(f"fetching uv from {index()} failed: {error}", file=sys.stderr)
        sys.exit(1)

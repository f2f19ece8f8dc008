"""The source distribution: it holds what README.md and its own tests need."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
from email.message import Message
from pathlib import Path

import pytest

from tests.support.pages import ROOT

pytest.importorskip("setuptools")
LOCAL = shutil.ignore_patterns(
    ".git", ".tox", ".venv", ".*_cache", "__pycache__", "build", "dist", "site", "*.egg-info"
)
BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist')"


def tracked() -> set[str]:
    """The files of this checkout; those of an unpacked distribution are all."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    return set()


def run(*arguments: str, cwd: Path) -> str:
    """What a command of this Python prints in a folder, which has to succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution, built of a copy of this source and unpacked elsewhere."""
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(ROOT, folder / "source", ignore=LOCAL)
    run("-c", BUILD, cwd=folder / "source")
    (archive,) = (folder / "source" / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (root,) = (folder / "unpacked").iterdir()
    return root


@pytest.fixture(scope="module")
def metadata(unpacked: Path) -> Message:
    """What a package index reads."""
    return email.message_from_string((unpacked / "PKG-INFO").read_text(encoding="utf-8"))


def test_it_holds_every_file_of_the_source(unpacked: Path) -> None:
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert tracked() - held == set()
    assert not [name for name in held if name.endswith((".pyc", ".so"))]
    assert {"README.md", "docs/speedup.png", "tests/constraints.txt", ".ci/run"} <= held


def test_its_tests_run_from_it(unpacked: Path) -> None:
    """Those of links look at every page and at all that README.md names."""
    done = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_docs.py"),
        *("-k", "links or page or every"),
        cwd=unpacked,
    )
    assert " passed" in done


def test_an_index_is_given_no_link_that_leads_nowhere(metadata: Message) -> None:
    text = str(metadata.get_payload())
    assert len(text) > 3000
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    assert "![" not in text
    assert "<picture" not in text
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []
    assert "docs/quickstart.md" in text


def test_the_metadata_says_what_is_true(metadata: Message) -> None:
    assert metadata["Author"] == "hf_kernel_patch"
    # the name of the field depends on the version of setuptools
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert metadata.get_all("Project-URL") is None
    minors = [
        found.group(1)
        for line in metadata.get_all("Classifier") or ()
        if (found := re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", line))
    ]
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    assert minors[0] == "11"
    assert f"py3{{{','.join(minors[1:])}}}" in tox

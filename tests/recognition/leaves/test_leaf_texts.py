"""Every text by which a leaf is known is the text of some supported transformers.

``leaf_texts.json`` says where: leaf and text -> version -> one place that has it. After a leaf has
changed, write it anew, by each of the supported versions in turn:

    python -m tests.recognition.leaves.test_leaf_texts --write

It looks through all of the installed transformers, which takes a minute. A text that no version
has is of no use: delete it from its leaf.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from hf_kernel_patch.models import architectures
from hf_kernel_patch.recognition import Leaf, experts_list, known
from hf_kernel_patch.recognition.source import _canonical, canonical, fingerprint, innermost
from tests.support.tiny import ROWS, TRANSFORMERS_5

pytestmark = pytest.mark.versions

FILE = Path(__file__).with_name("leaf_texts.json")
LEAVES = [code for code in known().values() if isinstance(code, Leaf)]  # before a test adds one
Expected = dict[str, dict[str, str]]


def texts() -> dict[str, tuple[Leaf | None, str, str]]:
    """Leaf and text, by name -> (leaf, the name of the helper or "", source)."""
    found: dict[str, tuple[Leaf | None, str, str]] = {}
    for leaf in LEAVES:
        for source in leaf.variants:
            found[f"{leaf.name} {digest(source)}"] = leaf, "", source
        for name, sources in leaf.helpers.items():
            for source in (sources,) if isinstance(sources, str) else sources:
                found[f"{leaf.name} {name} {digest(source)}"] = leaf, name, source
    # What a list of experts holds is looked at by itself.
    for source in experts_list._EXPERTS:
        found[f"an expert of a list {digest(source)}"] = None, "", source
    return found


def digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def has(place: str, leaf: Leaf | None, helper: str, source: str) -> bool:
    """Whether the leaf as a whole stands at a place, and there with this text."""
    module_name, _, name = place.partition(":")
    module = importlib.import_module(module_name)
    owner_name, _, attribute = name.rpartition(".")
    owner = getattr(module, owner_name) if owner_name else module
    value = innermost(getattr(owner, attribute))
    if leaf is not None and leaf.why_not(value, owner) is not None:
        return False
    if helper and leaf is not None:
        names = list(leaf.helpers)
        value = innermost(leaf.swallowed(value, owner)[names.index(helper)][2])
    return inspect.isfunction(value) and fingerprint(value) == canonical(source)


TEXTS = texts()
EXPECTED: Expected = json.loads(FILE.read_text()) if FILE.exists() else {}
VERSION = transformers.__version__
HERE = [name for name in TEXTS if VERSION in EXPECTED.get(name, {})]


def test_each_text_is_that_of_some_version() -> None:
    assert len(TEXTS) > 25
    assert set(EXPECTED) == set(TEXTS)
    assert all(EXPECTED.values())


@pytest.mark.parametrize("name", HERE)
def test_the_installed_version_has_it_there(name: str) -> None:
    assert has(EXPECTED[name][VERSION], *TEXTS[name])


def test_the_installed_version_has_been_looked_through() -> None:
    versions = {version for places in EXPECTED.values() for version in places}
    if VERSION not in versions:
        pytest.skip(f"transformers {VERSION} is none of {', '.join(sorted(versions))}")
    named = {name.split()[0] for name in HERE}
    # The leaves of which the tables say that this version has them.
    rows = {spec.code for _, spec in ROWS} & {leaf.name for leaf in LEAVES}
    assert {row for row in rows if any(name.split()[0] == row for name in EXPECTED)} <= named


# -- writing the file


def candidates(wanted: set[tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """(place, canonical text) of functions of transformers, those of the tables first.

    Of those with the wanted parameters.
    """
    tables = [table.module for table in architectures().values()]
    root = Path(str(transformers.__file__)).parent
    files = {
        ".".join(("transformers", *f.relative_to(root).with_suffix("").parts)): f
        for f in sorted(root.rglob("*.py"))
    }
    for module in sorted(files, key=lambda one: (one not in tables, one)):
        is_model = module.startswith("transformers.models.")
        if is_model and ".modeling_" not in module:
            continue
        tree = ast.parse(files[module].read_text())
        for node, prefix in functions(tree):
            if parameters(node) in wanted:  # which spares most of them the making of a text
                yield f"{module}:{prefix}{node.name}", _canonical(copy.deepcopy(node))


def parameters(node: ast.FunctionDef) -> tuple[str, ...]:
    given = node.args
    every = (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg)
    return tuple(one.arg for one in every if one is not None)


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, str]]:
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        yield from ((one, prefix) for one in inside if isinstance(one, ast.FunctionDef))


def write() -> None:
    """Enter where the installed version has each text."""
    wanted = {name: canonical(source) for name, (_, helper, source) in TEXTS.items() if not helper}
    places: dict[str, list[str]] = {name: [] for name in TEXTS}
    first = [ast.parse(text).body[0] for text in wanted.values()]
    named = {parameters(node) for node in first if isinstance(node, ast.FunctionDef)}
    for place, text in candidates(named):
        for name in (name for name, one in wanted.items() if one == text):
            places[name].append(place)
    for name, (leaf, helper, _) in TEXTS.items():
        if helper and leaf is not None:
            of_leaf = [f"{leaf.name} {digest(source)}" for source in leaf.variants]
            places[name] = [place for other in of_leaf for place in places[other]]
    found: Expected = {}
    for name, text in TEXTS.items():
        found[name] = dict(EXPECTED.get(name, {}))
        found[name].pop(VERSION, None)
        if text[0] is None and TRANSFORMERS_5:  # which has no lists of experts
            continue
        for place in places[name]:
            if usable(place, text):
                found[name][VERSION] = place
                break
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def usable(place: str, text: tuple[Leaf | None, str, str]) -> bool:
    try:
        return has(place, *text)
    except (ImportError, RuntimeError):  # it needs a package that is not here
        return False


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()

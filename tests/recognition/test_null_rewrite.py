"""With no edit at all, a function is written anew as the very function that it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
import transformers.models

from hf_kernel_patch.models import architectures
from hf_kernel_patch.recognition.edits import CannotRewrite
from hf_kernel_patch.recognition.function import NoSource, function_of
from hf_kernel_patch.recognition.rewriting import rewritten
from hf_kernel_patch.recognition.wrappers import innermost_of, rewrapped
from tests.support.tiny import ARCHITECTURES, tiny_model, tokens

pytestmark = pytest.mark.versions

OTHERS, CHUNKS = 200, 20


def chosen() -> list[str]:
    """The modelling modules of the tables, and ``OTHERS`` by a fixed seed."""
    named = [table.module for table in architectures().values()]
    folders = sorted(found.name for found in pkgutil.iter_modules(transformers.models.__path__))
    every = [f"transformers.models.{name}.modeling_{name}" for name in folders]
    others = [name for name in every if name not in named]
    random.Random(0).shuffle(others)
    return [*named, *others[:OTHERS]]


def imported(name: str) -> Any:
    """The module, or None where it is not there or needs a package that is not."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        return None


def functions_of(module: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of every forward, and of what the tables name."""
    for kind in list(vars(module).values()):
        if (
            isinstance(kind, type)
            and kind.__module__ == module.__name__
            and "forward" in vars(kind)
        ):
            yield f"{kind.__qualname__}.forward", vars(kind)["forward"]
    for table in architectures().values():
        for spec in table.sites if table.module == module.__name__ else ():
            owner_name, _, name = spec.qualname.rpartition(".")
            owner = getattr(module, owner_name, None) if owner_name else module
            value = getattr(owner, name, None)
            if name != "forward" and value is not None:
                yield spec.qualname, value


def reproduced(value: Any) -> Any:
    """The value, with the function inside of its wrappers written anew."""
    inner = innermost_of(value)
    return rewrapped(value, inner, rewritten(function_of(inner), [], {}))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_forward_is_reproduced(chunk: int) -> None:
    names = chosen()[chunk::CHUNKS]
    modules = [module for name in names if (module := imported(name)) is not None]
    assert len(modules) > len(names) / 2
    count = 0
    for module in modules:
        for name, value in functions_of(module):
            where = f"{module.__name__}.{name}"
            if not inspect.isfunction(value):
                # What the package kernels makes of a function.
                with pytest.raises((CannotRewrite, NoSource, AttributeError)):
                    reproduced(value)
                continue
            new = reproduced(value)
            same_wrappers(value, new, where)
            same_function(innermost_of(value), innermost_of(new), where)
            count += 1
    assert count > len(modules)


def same_function(old: FunctionType, new: FunctionType, where: str) -> None:
    """Whether another function is all that one is."""
    assert new is not old, where
    same_looks(old, new, where)
    same_code(old.__code__, new.__code__, where)
    assert len(old.__closure__ or ()) == len(new.__closure__ or ()), where
    for one, other in zip(old.__closure__ or (), new.__closure__ or ()):
        assert one is other, where
    assert inspect.getsource(new.__code__) == inspect.getsource(old.__code__), where


def same_looks(old: FunctionType, new: FunctionType, where: str) -> None:
    """Whether names, parameters, defaults and annotations are the same, the very same objects."""
    assert inspect.signature(new) == inspect.signature(old), where
    for name in ("__name__", "__qualname__", "__doc__", "__module__", "__defaults__"):
        assert getattr(new, name) is getattr(old, name), (where, name)
    assert new.__globals__ is old.__globals__, where
    for one, other in (
        (old.__annotations__, new.__annotations__),
        (old.__kwdefaults__ or {}, new.__kwdefaults__ or {}),
    ):
        assert list(one) == list(other), where
        assert all(one[key] is other[key] for key in one), where
    assert (old.__kwdefaults__ is None) == (new.__kwdefaults__ is None), where


#: What a code object is made of, but for its file and its constants.
_OF_CODE = [
    name
    for name in dir(CodeType)
    if name.startswith("co_") and name not in ("co_filename", "co_consts", "co_lnotab", "co_lines")
    if name != "co_positions"
]


def same_code(old: CodeType, new: CodeType, where: str) -> None:
    """Whether byte code, constants, names, lines and columns are the same, inside of it too."""
    for name in _OF_CODE:
        assert getattr(new, name) == getattr(old, name), (where, name)
    assert list(new.co_lines()) == list(old.co_lines()), where
    for one, other in zip(old.co_consts, new.co_consts, strict=True):
        if isinstance(one, CodeType):
            same_code(one, other, where)
        else:
            assert repr(one) == repr(other), where


def same_wrappers(old: Any, new: Any, where: str) -> None:
    """Whether the wrappers are the same, each around the new one below; all other cells shared."""
    while hasattr(old, "__wrapped__"):
        assert new is not old and new.__code__ is old.__code__, where
        same_looks(old, new, where)
        below, below_now = old.__wrapped__, new.__wrapped__
        held = 0
        for one, other in zip(old.__closure__, new.__closure__, strict=True):
            if contents(one) is old:
                assert other.cell_contents is new, f"{where}: a wrapper's own cell"
            elif contents(one) is below:
                held += 1
                assert other.cell_contents is below_now, where
            else:
                assert one is other, where
        assert held, where
        assert vars(new).keys() == vars(old).keys(), where
        old, new = below, below_now


def contents(cell: Any) -> Any:
    """What a cell holds, or None."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_runs_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name).eval()
    eager = model(tokens()).logits
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    written = [
        kind
        for kind in kinds
        if "forward" in vars(kind) and kind.__module__.startswith("transformers.models.")
    ]
    for kind in written:
        if inspect.isfunction(vars(kind)["forward"]):
            monkeypatch.setattr(kind, "forward", reproduced(vars(kind)["forward"]))
    assert written
    assert torch.equal(model(tokens()).logits, eager)


# -- what cannot be reproduced


class Odd:
    """Functions that are refused."""

    @staticmethod
    def static(x: Any) -> Any:
        return x

    @classmethod
    def of_the_class(cls, x: Any) -> Any:
        return x

    async def coroutine(self) -> None:
        """Nothing."""

    from_a_lambda = lambda self: self  # noqa: E731

    of_no_source = eval("lambda self: self")


REFUSED = {
    "static": "staticmethod",
    "of_the_class": "classmethod",
    "coroutine": "is asynchronous",
    "from_a_lambda": "is not where its code says",
    "of_no_source": "cannot be read",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reproduced_is_refused(name: str) -> None:
    with pytest.raises((CannotRewrite, NoSource), match=REFUSED[name]):
        reproduced(vars(Odd)[name])

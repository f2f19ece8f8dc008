"""Writing a function anew: its own text with a few places exchanged, compiled into its own scope.

Everything that no edit touches stays the original's: parameters, defaults, annotations, decorators,
globals, free variables, the names of private attributes, and the line numbers.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import itertools
import linecache
import os
from collections.abc import Iterable, Mapping, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

from hf_kernel_patch.recognition.edits import CannotRewrite, Edit, edited, tree_of
from hf_kernel_patch.recognition.function import Function

_FUTURE = 0
for _feature in __future__.all_feature_names:
    _FUTURE |= getattr(__future__, _feature).compiler_flag
_numbers = itertools.count(1)


def rewritten(
    function: Function, edits: Sequence[Edit], helpers: Mapping[str, object], label: str = ""
) -> FunctionType:
    """The function with the edits made; ``helpers`` are what the new text calls by these names.

    Raises CannotRewrite where the source is not what the function runs.
    """
    original = function.value
    if not agrees(function):
        raise CannotRewrite("its code is not that of its source")
    file = _pretended(original.__code__.co_filename, label)
    lines = edited(function, edits)
    code = compiled(function, lines, helpers, file)
    linecache.cache[file] = len("".join(lines)), None, lines, file
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or ()))
    cells |= {name: CellType(value) for name, value in helpers.items()}
    made = FunctionType(
        code,
        original.__globals__,
        original.__name__,
        original.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    return like(made, original)


def like(made: FunctionType, original: FunctionType) -> FunctionType:
    """A function that looks as another does: names, documentation, annotations, attributes."""
    made.__kwdefaults__ = original.__kwdefaults__ and dict(original.__kwdefaults__)
    made.__annotations__ = dict(original.__annotations__)
    made.__doc__, made.__module__ = original.__doc__, original.__module__
    made.__qualname__ = original.__qualname__
    made.__dict__.update(original.__dict__)
    if parameters := getattr(original, "__type_params__", ()):
        made.__type_params__ = parameters  # type: ignore[attr-defined]
    return made


def _pretended(file: str, label: str) -> str:
    """A name for the rewritten text, under which linecache keeps it.

    Debuggers and coverage, which normalise paths, take it for the original's file.
    """
    folder, name = os.path.split(file)
    number = next(_numbers)
    if not os.path.isabs(file):
        return f"{file} [{label} {number}]"
    return os.path.join(folder, f"[hf_kernel_patch {number}: {label}]", os.pardir, name)


def compiled(
    function: Function, lines: list[str], helpers: Mapping[str, object], file: str
) -> CodeType:
    """The code of the function in a text of its file."""
    free = *function.value.__code__.co_freevars, *helpers
    return compiled_tree(function, tree_of(function, lines), free, file)


def compiled_tree(
    function: Function, node: ast.FunctionDef, free: Iterable[str], file: str
) -> CodeType:
    """The code of a tree that stands in the function's place; ``free`` are its free variables."""
    original = function.value.__code__
    none = ast.arguments([], [ast.arg(name) for name in free], None, [], [], None, [])
    # A function around it makes its free variables free, a class its private names private.
    around: ast.stmt = ast.FunctionDef("around", none, [node], [])
    if function.class_name:
        around = ast.ClassDef(function.class_name, [], [], [around], [])
    # Python compiles a method of an imported name in another way than one of a name that is not.
    names = [ast.alias(name) for name in sorted(function.imported)]
    before: list[ast.stmt] = [ast.Import(names)] if names else []
    module = ast.fix_missing_locations(ast.Module([*before, around], []))
    flags = original.co_flags & _FUTURE
    code = compile(module, file, "exec", flags=flags, dont_inherit=True)
    for _ in range(3 if function.class_name else 2):
        code = next(one for one in code.co_consts if isinstance(one, CodeType))
    code = _renamed(code, code.co_qualname, original.co_qualname)
    nested = original.co_flags & inspect.CO_NESTED
    return code.replace(co_flags=code.co_flags & ~inspect.CO_NESTED | nested)


def _renamed(code: CodeType, before: str, after: str) -> CodeType:
    """A code object under another qualified name, and so what is inside of it."""

    def renamed(value: object) -> object:
        if isinstance(value, CodeType):
            return _renamed(value, before, after)
        # A class inside has its qualified name among the constants.
        if isinstance(value, str) and value.startswith(f"{before}.<locals>."):
            return after + value.removeprefix(before)
        return value

    return code.replace(
        co_qualname=after + code.co_qualname.removeprefix(before),
        co_consts=tuple(map(renamed, code.co_consts)),
    )


def agrees(function: Function) -> bool:
    """Whether a function's source is what it runs."""
    file = function.value.__code__.co_filename
    return not _differs(compiled(function, function.lines, {}, file), function.value)


def _differs(code: CodeType, function: FunctionType) -> bool:
    """Whether code compiled from a function's source is another than what it runs."""

    def plain(code: CodeType) -> tuple[Any, ...]:
        consts = [plain(one) if isinstance(one, CodeType) else one for one in code.co_consts]
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        return code.co_code, repr(consts), *names, code.co_flags, code.co_argcount

    return plain(code) != plain(function.__code__)

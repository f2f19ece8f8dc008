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
from collections.abc import Mapping, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.source import original_of

Part = str | ast.AST
_FUTURE = 0
for _feature in __future__.all_feature_names:
    _FUTURE |= getattr(__future__, _feature).compiler_flag
_numbers = itertools.count(1)


class CannotRewrite(Exception):
    """Why a function cannot be written anew."""


class Edit(NamedTuple):
    """From one (line, column in bytes) to another, this text.

    ``order`` tells apart what several edits add at one place.
    """

    start: tuple[int, int]
    end: tuple[int, int]
    text: str
    order: tuple[int, ...] = ()


def start(node: Any) -> tuple[int, int]:
    """Where a part begins."""
    return node.lineno, node.col_offset


def end(node: Any) -> tuple[int, int]:
    """Where a part ends."""
    return node.end_lineno, node.end_col_offset


def replace(function: Function, node: ast.AST, *parts: Part) -> list[Edit]:
    """Edits that make ``parts`` of a node: texts, and parts of the node that stay as they are.

    The parts that stay come in the order of the source. The text around them keeps the line breaks
    of what stood there, so that no line moves.
    """
    edits: list[Edit] = []
    place, text = start(node), ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if start(part) < place:
            raise CannotRewrite("its parts come in another order than expected")
        breaks = "\n" * (start(part)[0] - place[0] - text.count("\n"))
        # Where two nodes begin, what stands before the larger one comes first.
        order = () if edits else (1, *(-one for one in end(node)))
        edits.append(Edit(place, start(part), text + breaks, order))
        place, text = end(part), ""
    breaks = "\n" * (end(node)[0] - place[0] - text.count("\n"))
    if not edits:
        return [Edit(place, end(node), f"({text}{breaks})" if breaks else text)]
    # What follows on its last line has to follow on the text, so the breaks come before; where two
    # nodes end, what stands after the smaller one comes first.
    order = (0, *(-one for one in start(node)))
    return [*edits, Edit(place, end(node), breaks + text, order)]


def insert(place: tuple[int, int], text: str) -> Edit:
    """An edit that adds a text."""
    return Edit(place, place, text)


def edited(function: Function, edits: Sequence[Edit]) -> list[str]:
    """The lines of the function's file with the edits made; as many as before."""
    lines = [line.encode() for line in function.lines]
    count = len(lines)
    following = (count + 1, 0)
    for edit in sorted(edits, key=lambda one: (one.start, one.end, one.order), reverse=True):
        if edit.end > following:
            raise CannotRewrite(f"line {edit.start[0]}: two changes of one place")
        following = edit.start
        (row, column), (last_row, last_column) = edit.start, edit.end
        text = lines[row - 1][:column] + edit.text.encode() + lines[last_row - 1][last_column:]
        lines[row - 1 : last_row] = text.splitlines(keepends=True)
    if len(lines) != count:
        raise CannotRewrite("its lines would move")
    made = [line.decode() for line in lines]
    if edits:
        _node(function, made)
    return made


def rewritten(
    function: Function, edits: Sequence[Edit], helpers: Mapping[str, Any], label: str = ""
) -> FunctionType:
    """The function with the edits made; ``helpers`` are what the new text calls by these names.

    Raises CannotRewrite where the source is not what the function runs.
    """
    original = function.value
    if _differs(_compiled(function, function.lines, {}, original.__code__.co_filename), original):
        raise CannotRewrite("its code is not that of its source")
    file = _pretended(original.__code__.co_filename, label)
    lines = edited(function, edits)
    code = _compiled(function, lines, helpers, file)
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


def _compiled(
    function: Function, lines: list[str], helpers: Mapping[str, Any], file: str
) -> CodeType:
    """The code of the function in a text of its file."""
    original = function.value.__code__
    node = _node(function, lines)
    free = [ast.arg(name) for name in (*original.co_freevars, *helpers)]
    none = ast.arguments([], free, None, [], [], None, [])
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

    def renamed(value: Any) -> Any:
        if isinstance(value, CodeType):
            return _renamed(value, before, after)
        # A class inside has its qualified name among the constants.
        inside = isinstance(value, str) and value.startswith(f"{before}.<locals>.")
        return after + value.removeprefix(before) if inside else value

    return code.replace(
        co_qualname=after + code.co_qualname.removeprefix(before),
        co_consts=tuple(map(renamed, code.co_consts)),
    )


def _node(function: Function, lines: list[str]) -> ast.FunctionDef:
    """The syntax tree of the function in a text of its file, without what runs before its call."""
    first, last = function.first_line, function.node.end_lineno or 0
    indented = lines[first - 1][:1].isspace()
    head = "\n" * (first - 2) + "if True:\n" if indented else "\n" * (first - 1)
    try:
        tree = ast.parse(head + "".join(lines[first - 1 : last]))
    except SyntaxError as error:
        raise CannotRewrite(f"line {error.lineno}: its text would be no Python") from None
    node: Any = tree.body[0].body[0] if indented else tree.body[0]  # type: ignore[attr-defined]
    if not isinstance(node, ast.FunctionDef):
        raise CannotRewrite("it is no function with lines of its own")
    given = node.args
    for one in [n for n in ast.walk(given) if isinstance(n, ast.arg)]:
        one.annotation = None
    node.returns = None
    # They have code of their own (a lambda); its first line is that of its first decorator.
    node.decorator_list = [_nothing(one) for one in node.decorator_list]
    given.defaults = [_nothing(one) for one in given.defaults]
    given.kw_defaults = [one and _nothing(one) for one in given.kw_defaults]
    return node


def _nothing(node: ast.expr) -> ast.expr:
    return ast.copy_location(ast.Constant(None), node)


def _differs(code: CodeType, function: FunctionType) -> bool:
    """Whether code compiled from a function's source is another than what it runs."""

    def plain(code: CodeType) -> tuple[Any, ...]:
        consts = [plain(one) if isinstance(one, CodeType) else one for one in code.co_consts]
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        return code.co_code, repr(consts), *names, code.co_flags, code.co_argcount

    return plain(code) != plain(function.__code__)


# -- wrappers


def innermost_of(value: Any) -> Any:
    """The function under all wrappers that say what they wrap."""
    while hasattr(value := original_of(value), "__wrapped__"):
        value = value.__wrapped__
    return value


def rewrapped(value: Any, inner: FunctionType, new: FunctionType) -> Any:
    """``value``, a wrapper around ``inner`` or around such a wrapper, around ``new`` instead.

    All of its cells are shared but those that hold what it wraps, or itself. Raises CannotRewrite
    for a wrapper that is no function with what it wraps in one of its cells.
    """
    if value is inner:
        return new
    if not isinstance(value, FunctionType):
        raise CannotRewrite(f"a {type(value).__qualname__} wraps it in an unknown way")
    if not hasattr(value, "__wrapped__"):
        raise CannotRewrite(f"{_name(value)} wraps it in an unknown way")
    below = value.__wrapped__
    wrapped = rewrapped(original_of(below), inner, new)
    cells: list[CellType] = []
    found, itself = False, CellType()
    for cell in value.__closure__ or ():
        held = _contents(cell)
        found = found or held is below
        if _keeps(held, below) and held is not value:
            raise CannotRewrite(f"{_name(value)} wraps it in an unknown way")
        cells.append(itself if held is value else CellType(wrapped) if held is below else cell)
    if not found:
        raise CannotRewrite(f"{_name(value)} wraps it in an unknown way")
    made = FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells)
    )
    like(made, value)
    made.__dict__.pop("__hf_kernel_patch__", None)
    made.__wrapped__ = wrapped  # type: ignore[attr-defined]
    itself.cell_contents = made
    return made


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _keeps(held: Any, below: Any) -> bool:
    """Whether a value holds the wrapped function itself, and would go on calling it."""
    if isinstance(held, (list, tuple, set, frozenset)):
        return any(one is below for one in held)
    if isinstance(held, dict):
        return any(one is below for one in held.values())
    if isinstance(held, FunctionType):
        inside = [_contents(cell) for cell in held.__closure__ or ()]
        defaults = [*(held.__defaults__ or ()), *(held.__kwdefaults__ or {}).values()]
        return held is not below and any(one is below for one in [*inside, *defaults])
    return getattr(held, "func", None) is below or getattr(held, "__func__", None) is below


def _name(value: Any) -> str:
    return f"{getattr(value, '__qualname__', type(value).__qualname__)} of {value.__module__}"

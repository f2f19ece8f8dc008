"""A function that is written anew: everything that no edit touches stays the original's."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import linecache
import os
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_kernel_patch.recognition.edits import CannotRewrite, Edit, edited, insert, replace
from hf_kernel_patch.recognition.function import NoSource, function_of
from hf_kernel_patch.recognition.rewriting import rewritten
from hf_kernel_patch.recognition.wrappers import innermost_of, rewrapped
from tests.support.probes import run_python

Load = Callable[..., ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """(text) -> the module that it is the source of."""

    def load(text: str, name: str = "written") -> ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def exchanged(value: Any, text: str, new: str, **helpers: Any) -> Any:
    """The value with an expression of its source, wherever it stands, exchanged for another."""
    inner = innermost_of(value)
    function = function_of(inner)
    nodes = [n for n in ast.walk(function.node) if isinstance(n, ast.expr)]
    edits = [
        edit
        for node in nodes
        if function.text(node) == text
        for edit in replace(function, node, new)
    ]
    assert edits
    return rewrapped(value, inner, rewritten(function, edits, helpers, "test"))


def twice(value: Any) -> Any:
    return 2 * value


# -- lines and source

PLAIN = """
def plain(x):
    # one
    y = (
        x
        + 1
    )

    if y > 100:
        raise ValueError(y)
    return y
"""


def test_the_edited_text_runs_and_is_shown(load: Load) -> None:
    original = load(PLAIN).plain
    new = exchanged(original, "x\n        + 1", "twice(x)", twice=twice)
    assert (original(5), new(5)) == (6, 10)
    assert "twice(x)" in inspect.getsource(new) and "+ 1" not in inspect.getsource(new)
    assert "+ 1" in inspect.getsource(original)
    assert len(inspect.getsource(new)) > 0
    lines = [inspect.getsourcelines(one) for one in (original, new)]
    assert lines[0][1] == lines[1][1] and len(lines[0][0]) == len(lines[1][0])


def test_a_traceback_has_the_lines_of_the_original_and_the_new_text(load: Load) -> None:
    original = load(PLAIN.replace("ValueError(y)", "ValueError(x, y)")).plain
    new = exchanged(original, "ValueError(x, y)", "twice(ValueError)(x, y)", twice=lambda k: k)
    shown, numbers = [], []
    for function in (original, new):
        with pytest.raises(ValueError) as caught:
            function(100)
        shown.append("".join(traceback.format_exception(caught.value)))
        numbers.append(traceback.extract_tb(caught.value.__traceback__)[-1].lineno)
    assert numbers[0] == numbers[1] == 10
    assert "raise ValueError(x, y)" in shown[0]
    assert "raise twice(ValueError)(x, y)" in shown[1]


def test_debuggers_and_coverage_take_it_for_the_file_of_the_original(load: Load) -> None:
    module = load(PLAIN)
    new = exchanged(module.plain, "100", "1000")
    assert os.path.normpath(new.__code__.co_filename) == module.__file__
    assert new.__code__.co_filename != module.__file__

    def lines_of(function: Any) -> list[int]:
        found = []

        def trace(frame: Any, event: str, _: Any) -> Any:
            if event == "line" and frame.f_code is function.__code__:
                found.append(frame.f_lineno)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            function(1)
        finally:
            sys.settrace(before)
        return found

    assert lines_of(new) == lines_of(module.plain) != []


def test_its_source_outlives_a_check_of_the_cache(load: Load) -> None:
    new = exchanged(load(PLAIN).plain, "100", "1000")
    linecache.checkcache()
    assert "1000" in inspect.getsource(new)


# -- scope


def test_a_name_rebound_in_the_module_is_seen(load: Load) -> None:
    module = load("by = 1\n\ndef add(x):\n    return x + by\n")
    new = exchanged(module.add, "x + by", "twice(x + by)", twice=twice)
    module.by = 10
    assert new(1) == 22
    assert new.__globals__ is vars(module)
    assert "twice" not in vars(module)


def test_free_variables_are_the_very_cells(load: Load) -> None:
    module = load("""
def make():
    count, other = 0, "a"
    def call(x):
        nonlocal count
        count += 1
        return count, other, x
    def change(value):
        nonlocal other
        other = value
    return call, change
""")
    call, change = module.make()
    new = exchanged(call, "x", "twice(x)", twice=twice)
    assert call(1) == (1, "a", 1)
    assert new(1) == (2, "a", 2)
    assert call(1) == (3, "a", 1)
    change("b")
    assert new(1) == (4, "b", 2)
    names = new.__code__.co_freevars
    held = dict(zip(names, new.__closure__))
    for name, cell in zip(call.__code__.co_freevars, call.__closure__):
        assert held[name] is cell
    assert set(names) == {"count", "other", "twice"}


def test_an_empty_cell_is_filled_later(load: Load) -> None:
    module = load("""
def make(rewrite):
    def call(x):
        return x + later
    new = rewrite(call)
    later = 10
    return new
""")
    new = module.make(lambda call: exchanged(call, "x + later", "x * later"))
    assert new(2) == 20


def test_private_names_are_those_of_the_class(load: Load) -> None:
    module = load("""
class _Own:
    __factor = 3
    def __init__(self):
        self.__value = 2
    def value(self, __more=1):
        def inside():
            return self.__value * __more
        return inside() * _Own.__factor
    def __hidden(self):
        return self.__value

class Other(_Own):
    __factor = 100
""")
    new = exchanged(module._Own.value, "inside()", "twice(inside())", twice=twice)
    assert (module._Own().value(), new(module._Own()), new(module.Other())) == (6, 12, 12)
    hidden = exchanged(module._Own._Own__hidden, "self.__value", "twice(self.__value)", twice=twice)
    assert hidden(module._Own()) == 4 and hidden.__name__ == "__hidden"


def test_super_and_class_work(load: Load) -> None:
    module = load("""
class Base:
    def name(self):
        return "base"

class Child(Base):
    def name(self):
        return super().name() + __class__.__name__

class Grandchild(Child):
    pass
""")
    new = exchanged(module.Child.name, "super().name()", "twice(super().name())", twice=twice)
    assert new(module.Grandchild()) == "basebaseChild"


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_future_flags_are_the_originals(load: Load, future: str) -> None:
    module = load(future + "def make(x):\n    def inside(a: int): return a\n    return inside\n")
    new = exchanged(module.make, "inside", "twice(inside)", twice=lambda value: value)
    wanted = module.make(0).__annotations__
    assert new(0).__annotations__ == wanted == {"a": "int" if future else int}
    assert new.__code__.co_flags == module.make.__code__.co_flags


def test_names_of_what_is_inside_are_the_originals(load: Load) -> None:
    module = load("""
class Own:
    def make(self, x):
        def inside(): return x
        class Inner:
            def method(self): return x
        return inside, Inner, Inner.method
""")
    new = exchanged(module.Own.make, "inside, Inner, Inner.method", "Inner, Inner.method, inside")
    names = {one.__qualname__ for one in new(module.Own(), 1)}
    assert names == {one.__qualname__ for one in module.Own().make(1)}
    assert "Own.make.<locals>.Inner.method" in names


# -- what a function is besides its code

LOOKS = """
import functools

def mark(function=None, *, key=None):
    return function if key is None else lambda inner: inner

class Own:
    shared = []

    @mark
    @mark(key=lambda: 1)
    def looks(self, a, b: "str" = lambda x: x, *c, d: dict = shared, e=(lambda: [0])()) -> list:
        "What it does."
        return [a, b, c, d, e]
"""


def test_defaults_annotations_and_names_are_the_originals(load: Load) -> None:
    original = load(LOOKS).Own.looks
    original.attribute = object()
    new = exchanged(original, "[a, b, c, d, e]", "twice([a, b, c, d, e])", twice=twice)
    assert inspect.signature(new) == inspect.signature(original)
    assert new.__defaults__ is original.__defaults__
    assert new.__kwdefaults__ == original.__kwdefaults__
    assert new.__kwdefaults__ is not original.__kwdefaults__
    assert new.__kwdefaults__["d"] is original.__kwdefaults__["d"]
    assert new.__annotations__ == original.__annotations__
    assert new.__annotations__["return"] is original.__annotations__["return"]
    assert new.__doc__ == "What it does." and new.attribute is original.attribute
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(new, name) == getattr(original, name)
    assert new.__code__.co_firstlineno == original.__code__.co_firstlineno
    assert new(None, 1, 2, e=3) == 2 * original(None, 1, 2, e=3)


# -- wrappers

WRAPPERS = """
import functools

class Calls:
    def __init__(self, function):
        functools.update_wrapper(self, function)
    def __call__(self, *args):
        return self.__wrapped__(*args)

def counting(function):
    count = 0
    @functools.wraps(function)
    def wrapper(*args):
        nonlocal count
        count += 1
        return count, function(*args)
    return wrapper

def knowing_itself(function):
    @functools.wraps(function)
    def wrapper(self, *args):
        if type(self).call is not wrapper:
            raise RuntimeError("another wrapper")
        return function(self, *args)
    return wrapper

def by_partial(function):
    return functools.wraps(function)(functools.partial(function, None))

def by_list(function):
    held = [function]
    @functools.wraps(function)
    def wrapper(*args):
        return held[0](*args)
    return wrapper

def by_another(function):
    def run(*args):
        return function(*args)
    @functools.wraps(function)
    def wrapper(*args):
        assert function.__name__
        return run(*args)
    return wrapper

def by_dict(function):
    held = {"call": function}
    @functools.wraps(function)
    def wrapper(*args):
        assert function.__name__
        return held["call"](*args)
    return wrapper

def by_bound_partial(function):
    run = functools.partial(function, None)
    @functools.wraps(function)
    def wrapper(self, *args):
        assert function.__name__
        return run(*args)
    return wrapper

def by_default(function):
    @functools.wraps(function)
    def wrapper(*args, _function=function):
        return _function(*args)
    return wrapper

def lying(function):
    def other(*args):
        return function(*args)
    @functools.wraps(function)
    def wrapper(*args):
        return other(*args)
    return wrapper

def make(*decorators):
    def call(self, x):
        return x + 1
    for decorator in decorators:
        call = decorator(call)
    return type("Own", (), {"call": call})
"""


def test_a_wrapper_shares_its_cells(load: Load) -> None:
    module = load(WRAPPERS)
    value = module.make(module.counting, module.counting).call
    new = exchanged(value, "x + 1", "twice(x + 1)", twice=twice)
    assert value(None, 1) == (1, (1, 2))
    assert new(None, 1) == (2, (2, 4))
    assert value(None, 1) == (3, (3, 2))
    assert new.__wrapped__ is not value.__wrapped__
    assert innermost_of(new).__code__ is not innermost_of(value).__code__


def test_a_wrapper_that_knows_itself_knows_the_new_one(load: Load) -> None:
    module = load(WRAPPERS)
    kind = module.make(module.counting, module.knowing_itself)
    original = kind.call
    kind.call = exchanged(original, "x + 1", "twice(x + 1)", twice=twice)
    assert kind().call(1) == (1, 4)
    kind.call = original
    assert kind().call(1) == (2, 2)


@pytest.mark.parametrize(
    "name",
    ["by_partial", "by_list", "by_another", "by_dict", "by_bound_partial", "by_default", "lying"],
)
def test_a_wrapper_of_unknown_shape_is_refused(load: Load, name: str) -> None:
    module = load(WRAPPERS)
    value = vars(module.make(getattr(module, name)))["call"]
    with pytest.raises(CannotRewrite, match="wraps it in an unknown way"):
        exchanged(value, "x + 1", "x")


def test_a_wrapper_that_is_no_function_is_refused(load: Load) -> None:
    module = load(WRAPPERS)
    with pytest.raises(CannotRewrite, match="a Calls wraps it in an unknown way"):
        exchanged(module.make(module.Calls).call, "x + 1", "x")
    with pytest.raises(CannotRewrite, match="a staticmethod wraps it"):
        exchanged(staticmethod(module.counting), "wrapper", "function")


# -- where the source is

METHOD = """
class Own:
    def call(self, x):
        return x + 1
"""


def test_source_in_a_zip_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "packed.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("packed_module.py", METHOD)
    monkeypatch.syspath_prepend(str(path))
    module = importlib.import_module("packed_module")
    new = exchanged(module.Own.call, "x + 1", "twice(x + 1)", twice=twice)
    assert new(None, 1) == 4
    assert "twice(x + 1)" in inspect.getsource(new)
    assert os.path.normpath(new.__code__.co_filename) == module.Own.call.__code__.co_filename
    monkeypatch.delitem(sys.modules, "packed_module")


@pytest.mark.parametrize("file", ["<stdin>", "<string>"])
def test_source_that_nobody_kept_is_refused(file: str) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(METHOD, file, "exec"), namespace)
    with pytest.raises(NoSource, match="the source of __main__ cannot be read"):
        function_of(namespace["Own"].call)


def test_source_in_a_notebook() -> None:
    """IPython, and the REPL of Python 3.13, keep what was typed in linecache."""
    file, namespace = "<ipython-input-1-abc>", {"__name__": "__main__"}
    lines = METHOD.splitlines(keepends=True)
    linecache.cache[file] = len(METHOD), None, lines, file
    try:
        exec(compile(METHOD, file, "exec"), namespace)
        kind: Any = namespace["Own"]
        new = exchanged(kind.call, "x + 1", "twice(x + 1)", twice=twice)
        assert new(None, 1) == 4
        assert "twice(x + 1)" in "".join(linecache.getlines(new.__code__.co_filename))
    finally:
        del linecache.cache[file]


def test_python_c() -> None:
    program = f"""
from hf_kernel_patch.recognition import known
exec('''{METHOD}''')
class Typed:
    def call(self, x, y):
        return self.act_fn(x) * y
print(known()["gated_product"].why_not(Typed.call, Typed))
"""
    ran = run_python(program)
    assert ran.returncode == 0, ran.stderr
    if sys.version_info >= (3, 13):  # which keeps the text of -c
        assert ran.stdout == "None\n"
    else:
        assert "the source of __main__ cannot be read" in ran.stdout


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (METHOD.replace("1", "2"), "its code is not that of its source"),
        (METHOD.replace("x", "y"), "its code is not that of its source"),
        ("# a line more\n" + METHOD, "is not where its code says"),
        ("", "cannot be read|is not where its code says"),  # the second from Python 3.13 on
        (METHOD + "\n)", "is no Python"),
        (None, "cannot be read"),
    ],
)
def test_a_file_edited_after_import_is_refused(load: Load, after: str | None, why: str) -> None:
    module = load(METHOD, "edited_later")
    path = Path(str(module.__file__))
    linecache.cache.pop(str(path), None)
    if after is None:
        path.unlink()
        module.__spec__ = module.__loader__ = None  # type: ignore[assignment]
    else:
        path.write_text(after)
    with pytest.raises((CannotRewrite, NoSource), match=why):
        function = function_of(module.Own.call)
        rewritten(function, (), {})


def test_a_comment_edited_after_import_does_no_harm(load: Load) -> None:
    module = load(METHOD, "edited_later")
    path = Path(str(module.__file__))
    linecache.cache.pop(str(path), None)
    path.write_text(METHOD.replace("x + 1", "x + 1  # one more"))
    assert rewritten(function_of(module.Own.call), (), {})(None, 1) == 2


# -- edits


def test_two_nodes_that_begin_and_end_at_one_place(load: Load) -> None:
    function = function_of(load("def call(f, x):\n    return f.g.h(x)\n").call)
    outer: Any = function.node.body[0].value.func  # type: ignore[attr-defined]
    middle, inner = outer.value, outer.value.value
    ways = [
        replace(function, node, f"{name}(", node, ")")
        for name, node in (("c", outer), ("b", middle), ("a", inner))
    ]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        lines = edited(function, [edit for place in order for edit in ways[place]])
        assert lines[1] == "    return c(b(a(f).g).h)(x)\n"


def test_two_changes_of_one_place_are_refused(load: Load) -> None:
    function = function_of(load(PLAIN).plain)
    value = function.node.body[0].value  # type: ignore[attr-defined]
    with pytest.raises(CannotRewrite, match="line 5: two changes of one place"):
        edited(function, [*replace(function, value, "1"), *replace(function, value.left, "2")])


def test_a_text_that_is_no_python_is_refused(load: Load) -> None:
    function = function_of(load(PLAIN).plain)
    with pytest.raises(CannotRewrite, match="line 4: its text would be no Python"):
        edited(function, [insert((4, 4), ")")])


def test_lines_that_would_move_are_refused(load: Load) -> None:
    function = function_of(load(PLAIN).plain)
    with pytest.raises(CannotRewrite, match="its lines would move"):
        edited(function, [Edit((4, 4), (4, 4), "\n")])

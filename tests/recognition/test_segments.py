"""Cutting a function: what flows between its segments, and what cannot be cut."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import linecache
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_kernel_patch.recognition.function import function_of
from hf_kernel_patch.recognition.segments import CannotCut, body_of, cut

Write = Callable[[str], Any]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a function of a text of its own, as an import does."""

    def written(text: str) -> Any:
        path = tmp_path / f"written_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module: Any = ModuleType(path.stem)
        spec.loader.exec_module(module)
        linecache.checkcache()
        return getattr(module, "C", module).f

    return written


def run(function: Any, points: list[int], *given: Any) -> Any:
    """The function's result by its segments."""
    source = function_of(function)
    names: dict[str, Any] = dict(zip(inspect.signature(function).parameters, given))
    *before, last = cut(source, body_of(source), points)
    for segment in before:
        names |= zip(segment.outs, segment.run(*[names[name] for name in segment.ins]))
    return last.run(*[names[name] for name in last.ins])


TEXT = '''
import math
def around(free):
    class C:
        __hidden = 7
        def f(self, x, y):
            """Documentation."""
            z, (w, *rest) = x + 1, (y, 2, 3)
            x += self.__hidden + free
            for w in rest:
                if w > 2:
                    break
                z = z * w
            if y:
                y = [z + free for z in (x, z)][0]
                t = 1
            else:
                t = math.floor(2.5)
            with open("/dev/null"):
                n = z
                z = n + n
            return x, y, z, w, t
    return C
C = around(100)
'''


@pytest.mark.parametrize("points", [[k] for k in range(6)] + [[1, 2, 3, 4, 5], [2, 2, 4]])
def test_segments_one_after_the_other_do_what_the_function_does(
    points: list[int], write: Write
) -> None:
    function = write(TEXT)
    owner = object.__new__(function.__globals__["C"])
    for y in (0, 5):
        assert run(function, points, owner, 4, y) == function(owner, 4, y)


def test_only_what_is_read_later_flows_and_lines_are_kept(write: Write) -> None:
    function = write("def f(a, b):\n    c = a\n    d = b\n    c = d\n    return 1 / c\n")
    source = function_of(function)
    first, second, last = cut(source, body_of(source), [1, 3])
    assert first.outs == ()
    assert (second.ins, second.outs) == (("b",), ("c",))
    with pytest.raises(ZeroDivisionError) as error:
        last.run(0)
    assert error.traceback[-1].lineno == 4 and error.traceback[-1].path == Path(
        function.__code__.co_filename
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("if a:\n        return 1\n    return 2", "line 3: it may return before it is cut"),
        ("b = lambda: a\n    return b()", "line 2: a function inside of it"),
        ("b = sum(a for _ in '12')\n    return b", "line 2: a function inside of it"),
        ("if a:\n        b = 1\n    return b", "b may have no value where it is cut"),
        ("b = locals()\n    return b", "line 2: locals() looks at all of its names"),
        ("global DEPTH\n    return DEPTH", "line 2: global"),
        ("yield a\n    return a", "line 2: yield"),
        ("del a\n    return 1", "line 2: delete"),
    ],
)
def test_what_cannot_be_cut_says_why(text: str, reason: str, write: Write) -> None:
    source = function_of(write(f"def f(a):\n    {text}\n"))
    with pytest.raises(CannotCut) as error:
        cut(source, body_of(source), [1])
    assert reason in str(error.value)


def test_other_code_than_its_source_is_not_cut(write: Write) -> None:
    function = write("def f(a):\n    b = a\n    return b\n")
    function.__code__ = function.__code__.replace(co_consts=(None, 5))
    source = function_of(function)
    with pytest.raises(CannotCut, match="not that of its source"):
        cut(source, body_of(source), [1])


def test_a_cut_may_end_in_names_that_are_read_elsewhere(write: Write) -> None:
    source = function_of(write("def f(a):\n    b = a + 1\n    c = b + 1\n    return c\n"))
    *body, last = body_of(source)
    assert isinstance(last, ast.Return)
    first, second = cut(source, body, [1], live=("a", "c"))
    assert first.outs == ("b",) and second.outs == ("c",)
    assert second.run(*first.run(1)) == (3,)

"""A piece of a program as a graph: which values go in, which come out, and which are constants.

Values are kept in a list, a slot each. What a graph is given, what it makes and the constants that
its code computes are appended to it, so that later pieces find them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from hf_kernel_patch.recognition.segments import Segment, same

Values = list[Any]
#: name -> slot
Slots = dict[str, int]
#: What runs a segment: the slots of its arguments, and the function.
Step = tuple[list[int], Callable[..., Any]]


class CannotCapture(Exception):
    """Why a piece cannot be a graph."""


class Block(NamedTuple):
    """A captured piece.

    Attributes:
        graph: its graph, with ``replay(*tensors)``.
        paths: the slots of what it is given, and the place in a tuple that stands there or None.
        shapes: (shape, dtype) of what it is given.
        fixed: (slot, value) of what its code was captured with.
        constants: what its code computes besides tensors.
    """

    graph: Any
    paths: list[tuple[int, int | None]]
    shapes: list[tuple[Any, Any]]
    fixed: list[tuple[int, Any]]
    constants: list[Any]

    def fits(self, values: Values) -> bool:
        """Whether these values are like those that it was captured with."""
        given = (values[slot] if e is None else values[slot][e] for slot, e in self.paths)
        return all(
            (getattr(tensor, "shape", None), getattr(tensor, "dtype", None)) == shape
            for tensor, shape in zip(given, self.shapes)
        ) and all(values[slot] == value for slot, value in self.fixed)

    def replay(self, values: Values) -> None:
        """Append what it is given, what it makes and its constants."""
        given = [values[slot] if e is None else values[slot][e] for slot, e in self.paths]
        values += given
        values += self.graph.replay(*given)
        values += self.constants


def needed(segments: Iterable[Segment]) -> list[str]:
    """The names that segments, one after the other, have from before."""
    made: set[str] = set()
    found: dict[str, None] = {}
    for segment in segments:
        found |= {name: None for name in segment.ins if name not in made}
        made.update(segment.outs)
    return list(found)


def steps(segments: Iterable[Segment], slots: Slots, count: int) -> tuple[list[Step], Slots]:
    """How to run segments on ``count`` values, each appending what it gives; and where that is."""
    found: list[Step] = []
    slots = dict(slots)
    for segment in segments:
        found.append(([slots[name] for name in segment.ins], segment.run))
        for name in segment.outs:
            slots[name], count = count, count + 1
    return found, slots


def run(steps: Iterable[Step], values: Values) -> None:
    """Run steps and append what they give."""
    for slots, function in steps:
        values += function(*[values[slot] for slot in slots])


def captured(
    capture: Callable[..., Any],
    segments: Sequence[Segment],
    slots: Slots,
    values: Values,
    later: Collection[str],
) -> tuple[Block, Slots]:
    """The block of segments for values like these, and the slots with those of what it makes.

    ``later`` are the names that are read after it. Raises CannotCapture with the reason.
    """
    segments, slots = _without_passing(segments, slots)
    given = _Given(segments, slots, values)
    wanted = [n for n in dict.fromkeys(o for s in segments for o in s.outs) if n in later]
    runs: list[dict[str, Any]] = []
    versions: list[int] = []

    def function(*tensors: Any) -> tuple[Any, ...]:
        versions[:] = versions or [tensor._version for tensor in tensors]
        names = given.names(tensors)
        for segment in segments:
            names |= zip(segment.outs, segment.run(*[names[name] for name in segment.ins]))
        runs.append({name: names[name] for name in wanted})
        return tuple(_tensors(runs[-1].values(), tensors))

    graph = capture(function, given.tensors)
    if versions != [tensor._version for tensor in graph.inputs]:
        raise CannotCapture("what it is given is changed in place")
    first, last = runs[0], runs[-1]
    made = _tensors(last.values(), graph.inputs)
    if len({tensor.untyped_storage().data_ptr() for tensor in made}) < len(made):
        raise CannotCapture("two of its results share their memory")
    base, constants = len(values), list[Any]()
    for name, value in last.items():
        if (place := _place(value, graph.inputs)) is not None:
            slots[name] = base + place
        elif (place := _place(value, made)) is not None:
            _check_made(name, first[name], value, graph.inputs)
            slots[name] = base + len(graph.inputs) + place
        elif _is_constant(value):
            slots[name] = base + len(graph.inputs) + len(made) + len(constants)
            constants.append(value)
        else:
            raise CannotCapture(f"{_plain(name)} is a {type(value).__name__}")
    shapes = [(tensor.shape, tensor.dtype) for tensor in graph.inputs]
    return Block(graph, given.paths, shapes, given.fixed, constants), slots


def _without_passing(segments: Sequence[Segment], slots: Slots) -> tuple[list[Segment], Slots]:
    """Segments without values that only pass through: these get their new names at once."""
    found: list[Segment] = []
    slots, made = dict(slots), set[str]()
    for segment in segments:
        if segment.run is same:
            pairs = list(zip(segment.ins, segment.outs))
            slots |= {to: slots[name] for name, to in pairs if name not in made}
            kept = [(name, to) for name, to in pairs if name in made]
            segment = Segment(same, tuple(n for n, _ in kept), tuple(to for _, to in kept))
        found.append(segment)
        made.update(segment.outs)
    return found, slots


class _Given:
    """What segments have from before: tensors, and what is the same at every call."""

    def __init__(self, segments: Sequence[Segment], slots: Slots, values: Values):
        self.paths: list[tuple[int, int | None]] = []
        self.fixed: list[tuple[int, Any]] = []
        self.tensors: list[Any] = []
        self._made: dict[str, Any] = {}
        for name in needed(segments):
            self._add(name, slots[name], values[slots[name]])

    def _add(self, name: str, slot: int, value: Any) -> None:
        import torch

        if isinstance(value, torch.Tensor):
            self._made[name] = self._place(slot, None, value)
        elif type(value) in (tuple, list) and all(isinstance(v, torch.Tensor) for v in value):
            places = [self._place(slot, e, v) for e, v in enumerate(value)]
            self._made[name] = lambda tensors: type(value)(tensors[place] for place in places)
        elif _is_constant(value):
            self._made[name] = lambda tensors: value
            self.fixed.append((slot, value))
        elif isinstance(value, torch.nn.Module):
            self._made[name] = lambda tensors: value
        else:
            raise CannotCapture(f"it uses {_plain(name)}, a {type(value).__name__}")

    def _place(self, slot: int, element: int | None, value: Any) -> int:
        if (slot, element) not in self.paths:
            self.paths.append((slot, element))
            self.tensors.append(value)
        return self.paths.index((slot, element))

    def names(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """name -> value, with these tensors in place of those that were given."""
        return {
            name: tensors[made] if isinstance(made, int) else made(tensors)
            for name, made in self._made.items()
        }


def _tensors(values: Iterable[Any], besides: Sequence[Any]) -> list[Any]:
    """The tensors among values, each once, without these."""
    import torch

    found: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor) and _place(value, [*besides, *found]) is None:
            found.append(value)
    return found


def _place(value: Any, among: Sequence[Any]) -> int | None:
    return next((place for place, one in enumerate(among) if one is value), None)


def _check_made(name: str, first: Any, last: Any, given: Sequence[Any]) -> None:
    """What two runs give twice was not made in them, unless it is a part of what they got."""
    memory = last.untyped_storage().data_ptr()
    if any(memory == tensor.untyped_storage().data_ptr() for tensor in given):
        return
    if last.numel() and first.data_ptr() == last.data_ptr():
        raise CannotCapture(f"{_plain(name)} is neither given to it nor made by it")


def _is_constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_constant, value))
    return isinstance(value, _constants())


@cache
def _constants() -> tuple[type, ...]:
    import torch

    plain = torch.dtype, torch.device, torch.Size
    return type(None), bool, int, float, str, *plain


def _plain(name: str) -> str:
    """As the source has it."""
    return name.partition(".")[2]

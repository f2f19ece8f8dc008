"""A piece of a program as a graph: which values go in, which come out, and which are constants.

The values of a call are kept in one list; a slot is an index in it. What a graph is given, what it
makes and the constants that its code computes are appended to the list, where later pieces find
them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_kernel_patch.recognition.segments import Segment, same

if TYPE_CHECKING:
    import torch

    from hf_kernel_patch.recognition.rules.decoding.graphs import Graph

#: What a local name of the layer's or its attention's code holds, which may be anything.
Value = Any
Values = list[Value]
#: A name -> its slot.
Slots = dict[str, int]
#: What runs a segment: the slots of its arguments, and the function.
Step = tuple[list[int], Callable[..., Value]]
#: Where a tensor is: its slot, and its index in the tuple or list in that slot or None.
Path = tuple[int, int | None]


class CannotCapture(Exception):
    """Why a piece cannot be a graph."""


class Block(NamedTuple):
    """A captured piece.

    Attributes:
        graph: its graph, with ``replay(*tensors)``.
        paths: where the tensors are that it is given.
        shapes: (shape, dtype) of each of them at the capture.
        fixed: (slot, value) of everything else that its code was given at the capture.
        constants: what its code computes besides tensors.
    """

    graph: Graph
    paths: list[Path]
    shapes: list[tuple[torch.Size, torch.dtype]]
    fixed: list[tuple[int, Value]]
    constants: Values

    def fits(self, values: Values) -> bool:
        """Whether these values are like those that it was captured with."""
        given = (values[slot] if i is None else values[slot][i] for slot, i in self.paths)
        return all(
            (getattr(tensor, "shape", None), getattr(tensor, "dtype", None)) == shape
            for tensor, shape in zip(given, self.shapes)
        ) and all(values[slot] == value for slot, value in self.fixed)

    def replay(self, values: Values) -> None:
        """Append what it is given, what it makes and its constants."""
        given = [values[slot] if i is None else values[slot][i] for slot, i in self.paths]
        values += given
        values += self.graph.replay(*given)
        values += self.constants


def needed(segments: Iterable[Segment]) -> list[str]:
    """The names that segments, run one after the other, read and do not give a value before."""
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
    capture: Callable[..., Graph],
    segments: Sequence[Segment],
    slots: Slots,
    values: Values,
    later: Collection[str],
) -> tuple[Block, Slots]:
    """The block of segments for values like these, and the slots with those of what it makes.

    ``later`` are the names that are read after it. Raises CannotCapture with the reason.
    """
    segments, slots = _without_renaming(segments, slots)
    inputs = _Inputs(segments, slots, values)
    wanted = [n for n in dict.fromkeys(o for s in segments for o in s.outs) if n in later]
    runs: list[dict[str, Value]] = []
    versions: list[int] = []

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        versions[:] = versions or [tensor._version for tensor in tensors]
        names = inputs.names(tensors)
        for segment in segments:
            names |= zip(segment.outs, segment.run(*[names[name] for name in segment.ins]))
        runs.append({name: names[name] for name in wanted})
        return tuple(_tensors(runs[-1].values(), tensors))

    graph = capture(function, inputs.tensors)
    if versions != [tensor._version for tensor in graph.inputs]:
        raise CannotCapture("what it is given is changed in place")
    first, last = runs[0], runs[-1]
    made = _tensors(last.values(), graph.inputs)
    if len({tensor.untyped_storage().data_ptr() for tensor in made}) < len(made):
        raise CannotCapture("two of its results share their memory")
    base, constants = len(values), Values()
    for name, value in last.items():
        if (index := _index(value, graph.inputs)) is not None:
            slots[name] = base + index
        elif (index := _index(value, made)) is not None:
            _check_made(name, first[name], value, graph.inputs)
            slots[name] = base + len(graph.inputs) + index
        elif _is_constant(value):
            slots[name] = base + len(graph.inputs) + len(made) + len(constants)
            constants.append(value)
        else:
            raise CannotCapture(f"{_local_name(name)} is a {type(value).__name__}")
    shapes = [(tensor.shape, tensor.dtype) for tensor in graph.inputs]
    return Block(graph, inputs.paths, shapes, inputs.fixed, constants), slots


def _without_renaming(segments: Sequence[Segment], slots: Slots) -> tuple[list[Segment], Slots]:
    """Segments that rename no value from before: the new names get the slots of the old ones."""
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


class _Inputs:
    """The values that segments have from before: tensors, and what has to be the same each time."""

    def __init__(self, segments: Sequence[Segment], slots: Slots, values: Values):
        self.paths: list[Path] = []
        self.fixed: list[tuple[int, Value]] = []
        self.tensors: list[torch.Tensor] = []
        #: A name -> the index of its tensor, or what makes its value of all the tensors.
        self._sources: dict[str, int | Callable[[Sequence[torch.Tensor]], Value]] = {}
        for name in needed(segments):
            self._add(name, slots[name], values[slots[name]])

    def _add(self, name: str, slot: int, value: Value) -> None:
        import torch

        if isinstance(value, torch.Tensor):
            self._sources[name] = self._index(slot, None, value)
        elif type(value) in (tuple, list) and all(isinstance(v, torch.Tensor) for v in value):
            indices = [self._index(slot, i, v) for i, v in enumerate(value)]
            self._sources[name] = lambda tensors: type(value)(tensors[i] for i in indices)
        elif _is_constant(value):
            self._sources[name] = lambda tensors: value
            self.fixed.append((slot, value))
        elif isinstance(value, torch.nn.Module):
            self._sources[name] = lambda tensors: value
        else:
            raise CannotCapture(f"it uses {_local_name(name)}, a {type(value).__name__}")

    def _index(self, slot: int, element: int | None, tensor: torch.Tensor) -> int:
        """The index of a tensor among ``tensors``, to which it is added once."""
        if (slot, element) not in self.paths:
            self.paths.append((slot, element))
            self.tensors.append(tensor)
        return self.paths.index((slot, element))

    def names(self, tensors: Sequence[torch.Tensor]) -> dict[str, Value]:
        """Name -> value, with these tensors in place of those that were given."""
        return {
            name: tensors[source] if isinstance(source, int) else source(tensors)
            for name, source in self._sources.items()
        }


def _tensors(values: Iterable[Value], without: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors among values, each once, and none of those ``without`` which they are wanted."""
    import torch

    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor) and _index(value, [*without, *found]) is None:
            found.append(value)
    return found


def _index(value: Value, tensors: Sequence[torch.Tensor]) -> int | None:
    return next((index for index, tensor in enumerate(tensors) if tensor is value), None)


def _check_made(
    name: str, first: torch.Tensor, last: torch.Tensor, given: Sequence[torch.Tensor]
) -> None:
    """Raises CannotCapture for a result that two runs did not both make.

    It has the same memory in both, and is no view of what they were given.
    """
    memory = last.untyped_storage().data_ptr()
    if any(memory == tensor.untyped_storage().data_ptr() for tensor in given):
        return
    if last.numel() and first.data_ptr() == last.data_ptr():
        raise CannotCapture(f"{_local_name(name)} is neither given to it nor made by it")


def _is_constant(value: Value) -> bool:
    if type(value) is tuple:
        return all(map(_is_constant, value))
    return isinstance(value, _constants())


@cache
def _constants() -> tuple[type, ...]:
    import torch

    plain = torch.dtype, torch.device, torch.Size
    return type(None), bool, int, float, str, *plain


def _local_name(name: str) -> str:
    """The name as the source has it, without "layer." or "attention." before."""
    return name.partition(".")[2]

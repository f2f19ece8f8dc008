"""What a decoder layer does around its attention's cache, cut out of the code that is in force.

The layer's forward is cut where it calls its attention, the attention's forward after its rotary
function and after the attention interface. What comes before and what comes after is then a
program of segments, whose names are "layer.hidden_states" or "attention.key_states".
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.edits import CannotRewrite
from hf_kernel_patch.recognition.function import Function, NoSource, function_of
from hf_kernel_patch.recognition.rules.decoding.block import needed
from hf_kernel_patch.recognition.rules.decoding.cuts import (
    attention_of,
    call_in,
    free,
    mlp_of,
    only_computes,
    tail_of,
    with_result,
)
from hf_kernel_patch.recognition.segments import (
    CannotCut,
    Segment,
    body_of,
    cut,
    definition,
    made,
    parameters_of,
    reads,
    returned,
    same,
    stores,
)
from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import made_by_us
from hf_kernel_patch.recognition.wrappers import rewrapped

if TYPE_CHECKING:
    from torch import nn

LAYER, ATTENTION = "layer", "attention"
#: A function's globals, and a name in them.
Globals = tuple[dict[str, Any], str]
#: Takes a function's arguments in order and returns those of another one.
Arguments = Callable[..., tuple[object, ...]]
#: Packages whose code may be captured: it has no effect but its result.
HOMES = ("torch.nn.", "transformers.")


@dataclass(frozen=True)
class Program:
    """A layer in parts. A slot is an index in the list of the layer's and attention's arguments.

    Attributes:
        slots: the names of those arguments -> their slots.
        attention: the name of the layer's attribute that is its attention.
        attention_arguments: the layer's arguments -> the attention's, with None for each that
            ``before`` computes.
        before: up to the rotated heads.
        middle: cache and attention interface.
        after: what follows, up to the MLP.
        mlp: from there to the result.
        tail: what gives the layer's result its form.
        scope: the globals that the segments use.
    """

    slots: dict[str, int]
    attention: str
    attention_arguments: Arguments
    before: tuple[Segment, ...]
    middle: Segment
    after: tuple[Segment, ...]
    mlp: Segment
    tail: Segment
    scope: tuple[Globals, ...]


def program_of(forward: object, entry: str, layer: nn.Module) -> Program:
    """The program of a layer that runs ``forward``; raises CannotCut where there is none.

    ``entry`` is the name by which the forward calls what decodes in its place.
    """
    own = _function(_inside(forward))
    body = [s for s in body_of(own) if not (isinstance(s, ast.If) and entry in reads(s.test))]
    call = call_in(own, body)
    attention = getattr(layer, call.name)
    outer = type(attention).forward
    inner = _plain(outer, type(attention))
    other = _function(inner)
    call = call.with_arguments_named(own)
    body[call.at : call.at + 1] = [*call.before, call.statement]
    at = call.at + len(call.before)
    body = with_result(own, body)
    mlp, tail = mlp_of(layer, call.name, body, at + 1), tail_of(body)
    mlp = min(mlp, tail)
    only_computes(body[:at], body[at + 1 : tail])
    if tail <= at:
        raise CannotCut("its result is computed before its attention")
    first, _, after, feed, last = cut(own, body, [at, at + 1, mlp, tail])
    given, linked = call.without_computed(own, other, stores(*body[:at]))
    live = {*after.ins, *feed.ins, *last.ins}
    attend = attention_of(other, [name if name in live else "" for name in call.targets])
    slots = _slots(parameters_of(own), LAYER, 0)
    slots |= _slots(parameters_of(other), ATTENTION, len(slots))
    return Program(
        slots,
        call.name,
        _arguments(own, given, _binder(other, outer, inner)),
        (_of(LAYER, first), _renamed(LAYER, ATTENTION, linked), _of(ATTENTION, attend.before)),
        _of(ATTENTION, attend.middle),
        (
            _of(ATTENTION, attend.after),
            _renamed(ATTENTION, LAYER, attend.results),
            _of(LAYER, after),
        ),
        _of(LAYER, feed),
        _of(LAYER, last),
        (*_scope(own, body), *_scope(other, body_of(other))),
    )


def _slots(names: Iterable[str], where: str, first: int) -> dict[str, int]:
    return {f"{where}.{name}": first + index for index, name in enumerate(names)}


def _of(where: str, segment: Segment) -> Segment:
    """A segment whose names say whether they are the layer's or the attention's."""
    ins, outs = ([f"{where}.{n}" for n in names] for names in (segment.ins, segment.outs))
    return replace(segment, ins=tuple(ins), outs=tuple(outs))


def _renamed(source: str, to: str, names: dict[str, str]) -> Segment:
    """What gives names of one function the values of another's; ``names`` are {new: old}."""
    ins, outs = names.values(), names.keys()
    return Segment(
        same,
        tuple(f"{source}.{n}" for n in ins),
        tuple(f"{to}.{n}" for n in outs),
    )


def _scope(function: Function, body: Sequence[ast.stmt]) -> list[Globals]:
    scope = function.value.__globals__
    return [(scope, name) for name in sorted(reads(*body)) if name in scope]


# -- the functions


def _function(value: object) -> Function:
    if not isinstance(value, FunctionType):
        raise CannotCut(f"a {type(value).__qualname__} stands there")
    if not f"{value.__globals__.get('__name__')}.".startswith(HOMES):
        raise CannotCut(f"{value.__qualname__} of {value.__module__} is no part of transformers")
    try:
        return function_of(value)
    except NoSource as error:
        raise CannotCut(str(error)) from None


def _inside(value: object) -> object:
    """The function under all wrappers."""
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value


def _plain(value: FunctionType, cls: type) -> FunctionType:
    """What an attention's forward runs, under wrappers that only rename arguments."""
    while hasattr(value, "__wrapped__"):
        if not value.__code__.co_qualname.startswith("deprecate_kwarg."):
            raise CannotCut(f"{value.__code__.co_qualname} wraps the forward of {cls.__name__}")
        value = value.__wrapped__
    return value


def _binder(function: Function, outer: FunctionType, inner: FunctionType) -> Arguments:
    """A function with the attention's parameters and wrappers that returns its arguments."""
    given = copy.deepcopy(function.node.args)
    given.defaults, given.kw_defaults = [], [None for _ in given.kwonlyargs]
    for argument in ast.walk(given):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    body = [returned(parameters_of(function), function.node)]
    binder = made(function, definition(function.node.name, given, body, function.node))
    binder.__defaults__, binder.__kwdefaults__ = inner.__defaults__, inner.__kwdefaults__
    try:
        wrapped: Arguments = rewrapped(outer, inner, binder)
    except CannotRewrite as error:
        raise CannotCut(str(error)) from None
    return wrapped


def _arguments(function: Function, call: ast.Call, bind: Arguments) -> Arguments:
    """The layer's arguments -> those that its attention gets by this call."""
    to = free(function, "bind")
    given = ast.Call(ast.Name(to, ast.Load()), [call.func, *call.args], call.keywords)
    lines = function.node
    statement = ast.copy_location(ast.Return(ast.copy_location(given, lines)), lines)
    names = to, *parameters_of(function)
    run: Arguments = made(function, definition("arguments", names, [statement], lines))
    return lambda *values: run(bind, *values)


# -- the programs of layers

#: What a layer and its modules run -> the program, or why there is none.
Programs = dict[tuple[object, ...], Program | str]


def program_in(layer: nn.Module, site: Site, entry: str, known: Programs) -> Program | str:
    """The program of a layer in whose forward the site is, or why there is none."""
    composed = (made_by_us(vars(cls).get("forward")) for cls in type(layer).__mro__)
    forward = next((m.function for m in composed if m and site in m.sites.values()), None)
    if forward is None:
        return f"{type(layer).__name__} runs another forward"
    key = forward, *[(name, type(child).forward) for name, child in layer.named_children()]
    if key not in known:
        try:
            known[key] = program_of(forward, entry, layer)
        except CannotCut as error:
            known[key] = str(error)
    return known[key]


def inputs_of(program: Program) -> list[int]:
    """The slots of what the code before the attention is given, except for the modules."""
    names = [name for name in needed(program.before) if not name.endswith(".self")]
    return [program.slots[name] for name in names]

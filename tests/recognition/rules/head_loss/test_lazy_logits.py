"""Logits that are computed at their first read, and only then."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils.operations import recursively_apply
from torch.nn.parallel.distributed import _tree_flatten_with_rref
from torch.utils import _pytree as pytree

import hf_kernel_patch
from tests.recognition.rules.head_loss.steps import walked
from tests.support.tiny import tiny_model, tokens

LOSS = "linear_cross_entropy"


def matched(output: Any) -> Any:
    match output:
        case {"logits": found}:
            return found


READS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda output: output.logits,
    "getattr": lambda output: getattr(output, "logits", None),
    "key": lambda output: output["logits"],
    "get": lambda output: output.get("logits"),
    "index": lambda output: output[1],
    "negative index": lambda output: output[-2],
    "slice": lambda output: output[:2][1],
    "slice after the loss": lambda output: output[1:][0],
    "tuple": lambda output: output.to_tuple()[1],
    "dict": lambda output: dict(output)["logits"],
    "unpacked": lambda output: {**output}["logits"],
    "a copy": lambda output: copy.copy(output).logits,
    "a copy by its method": lambda output: output.copy()["logits"],
    "items": lambda output: next(value for name, value in output.items() if name == "logits"),
    "values": lambda output: list(output.values())[1],
    "vars": lambda output: vars(output)["logits"],
    "attributes": lambda output: output.__dict__["logits"],
    "star": lambda output: [*output.to_tuple()][1],
    "fields": lambda output: [getattr(output, one.name) for one in dataclasses.fields(output)][1],
    "replaced": lambda output: dataclasses.replace(output).logits,
    "matched": matched,
    "leaves": lambda output: pytree.tree_leaves(output)[1],
    "mapped": lambda output: pytree.tree_map(lambda one: one, output).logits,
    "updated": lambda output: {"logits": None, **output}["logits"],
    "of another": lambda output: type(output)(output)["logits"],
}


@pytest.mark.parametrize("read", READS)
def test_every_way_of_reading_gives_the_real_logits_once(
    read: str, pair: tuple[Any, Any], made: list[bool]
) -> None:
    inside, eager = pair
    assert made == []
    found = READS[read](inside)
    assert type(found) is torch.Tensor
    assert torch.equal(found, eager.logits)
    for name in ("requires_grad", "is_leaf", "shape", "dtype", "device", "layout"):
        assert getattr(found, name) == getattr(eager.logits, name)
    assert type(found.grad_fn) is type(eager.logits.grad_fn)
    assert list(vars(inside)) == list(vars(eager))
    assert type(list(OrderedDict.values(inside))[1]) is torch.Tensor  # nothing stands in any more
    for again in READS.values():
        assert torch.equal(again(inside), eager.logits)
    assert made == [True]


def test_the_rest_of_the_output_is_read_without_them(
    pair: tuple[Any, Any], made: list[bool]
) -> None:
    inside, eager = pair
    assert isinstance(inside, type(eager))
    assert list(inside) == list(eager) == list(inside.keys())
    assert len(inside) == len(eager)
    assert "logits" in inside
    assert "nothing" not in inside
    assert inside.get("nothing", 3) == 3
    for loss in (inside.loss, inside["loss"], inside[0], inside[:1][0], inside.get("loss")):
        torch.testing.assert_close(loss, eager.loss)
    assert inside[-1] is inside.past_key_values
    with pytest.raises(KeyError):
        inside["nothing"]
    with pytest.raises(IndexError):
        inside[17]
    inside.loss.backward()
    assert made == []


def test_gradients_flow_through_logits_that_are_read(pair: tuple[Any, Any]) -> None:
    weight = head_of(pair[1])
    ours, theirs = (
        torch.autograd.grad(one.loss + one.logits.square().mean(), weight)[0] for one in pair
    )
    torch.testing.assert_close(ours, theirs)


def head_of(output: Any) -> Any:
    """The head's weight, as the graph of the logits has it."""
    todo = [output.logits.grad_fn]
    while todo:
        node = todo.pop(0)
        if hasattr(node, "variable") and node.variable.shape == (128, 64):
            return node.variable
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    raise AssertionError("no head in the graph")


def test_frameworks_look_at_them_cast_and_detach_without_computing(
    pair: tuple[Any, Any], made: list[bool]
) -> None:
    inside, eager = pair
    stand_in = walked(inside)[1]
    assert isinstance(stand_in, torch.Tensor)
    assert torch.is_tensor(stand_in)
    assert stand_in.shape == eager.logits.shape
    assert stand_in.size(-1) == 128
    assert stand_in.dim() == stand_in.ndim == 3
    assert stand_in.numel() == eager.logits.numel()
    assert stand_in.dtype is torch.float32
    assert stand_in.device == eager.logits.device
    assert torch.is_floating_point(stand_in)
    assert stand_in.requires_grad
    assert not stand_in.is_leaf
    assert not stand_in.detach().requires_grad
    later = stand_in.detach().to(torch.float64).float()
    assert later.dtype is torch.float32
    leaves, spec, _ = _tree_flatten_with_rref(inside)
    assert any(leaf is stand_in for leaf in leaves)
    mapped = recursively_apply(lambda x: x.detach(), inside)
    assert type(mapped) is type(inside)
    assert made == []
    assert torch.equal(later, eager.logits)
    assert torch.equal(mapped.logits, eager.logits)
    assert not mapped.logits.requires_grad
    assert torch.equal(pytree.tree_unflatten(leaves, spec).logits, eager.logits)
    assert made == [True]


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: 2 * x,
        lambda x: x.argmax(-1),
        lambda x: torch.softmax(x, dim=-1),
        lambda x: x[..., :-1, :],
        lambda x: torch.cat([x, x]),
        lambda x: x.detach().numpy(),
        lambda x: torch.nn.functional.cross_entropy(x.flatten(0, 1), tokens().flatten()),
        lambda x: x.cpu().float(),
        lambda x: pickle.loads(pickle.dumps(x.detach())),
        list,
    ],
)
def test_a_stand_in_is_the_tensor_in_any_use(
    use: Callable[[Any], Any], pair: tuple[Any, Any]
) -> None:
    inside, eager = pair
    stand_in = walked(inside)[1]
    found, expected = use(stand_in), use(eager.logits)
    assert type(found) is type(expected)
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_mixed_precision_of_accelerate_converts_them_unread(
    made: list[bool],
) -> None:
    from accelerate.utils import convert_outputs_to_fp32

    model = tiny_model("llama", torch.bfloat16).train()
    eager = convert_outputs_to_fp32(model.forward)(tokens(), labels=tokens())
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        inside = convert_outputs_to_fp32(model.forward)(tokens(), labels=tokens())
    assert made == []
    assert inside.logits.dtype is torch.float32
    assert torch.equal(inside.logits, eager.logits)
    assert made == [True]


def test_gathering_as_data_parallel_does_it(pair: tuple[Any, Any]) -> None:
    """Type of the first, from pairs of a name and the values of all."""
    inside, eager = pair
    outputs = [inside, inside]
    names = [name for name in inside if name not in ("past_key_values", "cache")]
    gathered = type(inside)((name, torch.stack([one[name] for one in outputs])) for name in names)
    assert torch.equal(gathered.logits[1], eager.logits)
    assert torch.equal(gathered["logits"][0], eager.logits)


def test_a_pickle_and_a_deep_copy_are_of_the_original_class(pair: tuple[Any, Any]) -> None:
    inside, eager = pair
    with torch.no_grad():
        plain = type(inside)(loss=inside.loss.detach(), logits=walked(inside)[1].detach())
        for found in (pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain)):
            assert type(found) is type(eager)
            assert torch.equal(found.logits, eager.logits)
            assert torch.equal(vars(found)["logits"], eager.logits)
    assert b"hf_kernel_patch" not in pickle.dumps(plain)


def test_a_whole_output_as_a_dictionary(made: list[bool]) -> None:
    model, found = tiny_model("llama").train(), []
    with torch.no_grad():
        for include in (None, LOSS):
            with hf_kernel_patch.patched(include, models="llama"):
                output = model(tokens(), labels=tokens(), use_cache=False)
            found.append((dataclasses.asdict(output), dataclasses.astuple(output)))
    (eager, plain), (inside, ours) = found
    assert list(inside) == list(eager)
    for one, other in ((inside["logits"], eager["logits"]), (ours[1], plain[1])):
        assert type(one) is type(other)
        assert torch.equal(one, other)
    assert made == [True]


def test_an_output_can_be_written_to(pair: tuple[Any, Any], made: list[bool]) -> None:
    inside, _ = pair
    inside.loss = torch.tensor(1.0)
    assert inside["loss"] == 1
    inside.logits = torch.zeros(3)
    assert torch.equal(inside["logits"], torch.zeros(3))
    inside["logits"] = torch.ones(3)
    assert torch.equal(inside.logits, torch.ones(3))
    assert torch.equal(inside[1], torch.ones(3))
    assert made == []

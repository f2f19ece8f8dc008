"""Logits that are computed at their first read, and only then."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import hf_kernel_patch
from hf_kernel_patch import KernelPatchWarning
from hf_kernel_patch.forms.logits import Logits
from tests.tiny import tiny_model, tokens

LOSS = "linear_cross_entropy"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry for every time that logits are computed."""
    found: list[bool] = []
    make = Logits.make

    def counted(self: Any) -> Any:
        found.append(True)
        return make(self)

    monkeypatch.setattr(Logits, "make", counted)
    return found


@pytest.fixture
def pair(made: list[bool]) -> Iterator[tuple[Any, Any]]:
    """(patched, eager) outputs of one training step."""
    model = tiny_model("llama").train()
    eager = model(tokens(), labels=tokens())
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        yield model(tokens(), labels=tokens()), eager


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
    assert found.requires_grad
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_are_those_of_the_forward_in_whatever_mode_they_are_read(
    mode: Callable[[], Any], pair: tuple[Any, Any], made: list[bool]
) -> None:
    inside, eager = pair
    with mode():
        assert torch.equal(inside.logits, eager.logits)
        assert inside.logits.requires_grad  # as the original's
    inside.logits.square().mean().backward()
    assert made == [True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_of_a_forward_without_gradients_need_none(mode: Callable[[], Any]) -> None:
    model = tiny_model("llama").train()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True), mode():
        inside = model(tokens(), labels=tokens())
    assert not inside.logits.requires_grad
    assert inside.logits.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(copy.deepcopy(inside).logits, inside.logits)
    assert inside.logits.numpy().shape == (2, 17, 128)


def test_what_is_written_into_logits_stays(pair: tuple[Any, Any], made: list[bool]) -> None:
    inside, _ = pair
    with torch.no_grad():
        inside.logits[..., 0] = -1e9
    assert (inside.logits[..., 0] == -1e9).all()
    assert made == [True]


def test_logits_are_of_the_weights_that_the_forward_had() -> None:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    given = {"lm_head.weight": torch.nn.Parameter(torch.randn(128, 64))}

    def both() -> list[Any]:
        call = torch.func.functional_call(model, given, (tokens(),), {"labels": tokens()})
        return [call, model(tokens(), labels=tokens())]

    eager = both()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        inside = both()
    model.lm_head = torch.nn.Linear(64, 128, bias=False)
    for ours, theirs in zip(inside, eager, strict=True):
        assert torch.equal(ours.logits, theirs.logits)


def other_weight(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def other_memory(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data * 2


def other_dtype(model: Any) -> None:
    model.to(torch.bfloat16)


def step_of(**options: Any) -> Callable[[Any], None]:
    def step(model: Any) -> None:
        torch.optim.AdamW(model.parameters(), lr=0.1, **options).step()

    return step


CHANGES = [other_weight, other_memory, other_dtype, step_of(foreach=False), step_of(fused=True)]


@pytest.mark.parametrize("change", CHANGES)
def test_logits_read_after_the_weights_have_changed_are_warned_of(
    change: Callable[[Any], None], made: list[bool]
) -> None:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        outputs = [model(tokens(), labels=tokens()) for _ in range(2)]
        outputs[0].loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs[1].logits  # noqa: B018
        change(model)
    with pytest.warns(KernelPatchWarning, match="after its weights have changed"):
        outputs[0].logits  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs[0].logits  # noqa: B018
    assert made == [True, True]


def test_optimizers_are_left_alone_once_nothing_is_patched() -> None:
    from torch.optim import optimizer

    model = tiny_model("llama").train()
    before = dict(optimizer._global_optimizer_post_hooks)
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        model(tokens(), labels=tokens())
        assert len(optimizer._global_optimizer_post_hooks) == len(before) + 1
    assert optimizer._global_optimizer_post_hooks == before


def test_frameworks_look_at_them_cast_and_detach_without_computing(
    pair: tuple[Any, Any], made: list[bool]
) -> None:
    inside, eager = pair
    (stand_in,) = (value for name, value in inside.items() if name == "logits")
    assert isinstance(stand_in, torch.Tensor)
    assert torch.is_tensor(stand_in)
    assert stand_in.shape == eager.logits.shape
    assert stand_in.size(-1) == 128
    assert stand_in.dim() == stand_in.ndim == 3
    assert stand_in.numel() == eager.logits.numel()
    assert stand_in.dtype is torch.float32
    assert stand_in.device == eager.logits.device
    assert torch.is_floating_point(stand_in)
    assert not stand_in.requires_grad
    later = stand_in.detach().to(torch.float64).float()
    assert later.dtype is torch.float32
    leaves, spec = pytree.tree_flatten(inside)
    assert any(leaf is stand_in for leaf in leaves)
    mapped = pytree.tree_map_only(torch.Tensor, lambda x: x.detach(), inside)
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
    stand_in = dict(inside.items())["logits"]
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
    names = [name for name in inside if name != "past_key_values"]
    gathered = type(inside)((name, torch.stack([one[name] for one in outputs])) for name in names)
    assert torch.equal(gathered.logits[1], eager.logits)
    assert torch.equal(gathered["logits"][0], eager.logits)


def test_a_pickle_and_a_deep_copy_are_of_the_original_class(pair: tuple[Any, Any]) -> None:
    inside, eager = pair
    with torch.no_grad():
        plain = type(inside)(
            loss=inside.loss.detach(), logits=dict(inside.items())["logits"].detach()
        )
        for found in (pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain)):
            assert type(found) is type(eager)
            assert torch.equal(found.logits, eager.logits)
            assert torch.equal(vars(found)["logits"], eager.logits)
    assert b"hf_kernel_patch" not in pickle.dumps(plain)


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


def test_a_detached_read_keeps_nothing_of_the_graph_alive_longer_than_the_output() -> None:
    import gc
    import weakref

    model = tiny_model("llama").train()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        output = model(tokens(), labels=tokens())
    hidden = weakref.ref(dict(output.items())["logits"].pending.hidden)
    assert hidden() is not None
    del output
    gc.collect()
    assert hidden() is None

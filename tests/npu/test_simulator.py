"""The simulated device: what runs there, what it refuses to fake, and models that train on it."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import npusim
from hf_kernel_patch import devices
from npusim import build
from npusim.agreement import META_DIFFERS, Disagreement, check_meta, check_returns
from npusim.install import kernel_of
from npusim.operators import Operator, operators
from tests.support.tiny import error, largest_error, outputs_and_gradients, tiny_model, tokens

ROOT = Path(npusim.__file__).parent.parent
CALLS = Callable[[], dict[str, int]]


def test_the_package_sees_an_npu() -> None:
    assert torch.npu.is_available()
    assert devices.current() == "npu"
    assert devices.why_not("npu") is None


def test_the_wheel_is_the_one_from_pypi_unmodified() -> None:
    assert Path(torch_npu.__file__).parent.name == "torch_npu"
    assert npusim.available() is None
    assert isinstance(torch_npu.npu_rms_norm, torch._ops.OpOverloadPacket)


def test_nothing_is_built_in_the_tree() -> None:
    folder = build.build()
    assert ROOT not in folder.parents
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        (build.RUNTIME, *build.COMPANIONS)
    )


def test_the_simulator_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert npusim.available() == "npusim needs gcc"


def test_the_simulator_does_not_start_twice() -> None:
    with pytest.raises(RuntimeError, match="already imported"):
        npusim.start()


def test_unless_asked_for_the_tests_are_skipped_and_that_is_success() -> None:
    environment = {n: v for n, v in os.environ.items() if n != npusim.VARIABLE}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/npu"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert f"asked for by {npusim.VARIABLE}=1" in ran.stdout
    assert "passed" not in ran.stdout


# operators that are not there


def test_an_operator_without_a_reference_fails_by_name() -> None:
    x = torch.ones(2, 4, device="npu")
    with pytest.raises(NotImplementedError, match="npu::npu_silu has no reference"):
        torch_npu.npu_silu(x)


def test_every_operator_of_the_wheel_is_ours_or_fails() -> None:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    names = {name.removeprefix("npu::") for name in registered if name.startswith("npu::")}
    assert operators().keys() < names
    assert len(names) > 400


def test_an_argument_that_the_reference_does_not_know_fails_by_name() -> None:
    x = torch.ones(1, 1, 2, 4, device="npu")
    with pytest.raises(NotImplementedError, match=r"npu_rotary_mul.* with rotate="):
        torch_npu.npu_rotary_mul(x, x, x, "half", torch.ones(4, 4, device="npu"))


def test_a_tensor_on_the_host_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="npu_rms_norm with a tensor on cpu"):
        torch_npu.npu_rms_norm(torch.ones(2, 4, device="npu"), torch.ones(4))


def test_a_kernel_of_the_wheel_that_is_reached_all_the_same_fails() -> None:
    with pytest.raises(RuntimeError, match="LogMatrixDeterminant"):
        torch.slogdet(torch.eye(2, device="npu"))


# agreement with the wheel


def test_results_unlike_the_meta_kernels_are_an_error() -> None:
    norm = torch.ops.npu.npu_rms_norm.default
    arguments = {"input": torch.ones(2, 4), "gamma": torch.ones(4), "epsilon": 1e-6}
    right = torch.ones(2, 4), torch.ones(2, 1)
    check_meta(norm, arguments, right)
    wrong = [(right[0], torch.ones(2)), (right[0].half(), right[1])]
    for results in wrong:
        with pytest.raises(Disagreement, match="the meta kernel"):
            check_meta(norm, arguments, results)


def test_results_unlike_the_schema_are_an_error() -> None:
    norm = torch.ops.npu.npu_rms_norm.default
    check_returns(norm, (torch.ones(2), torch.ones(2)))
    for results in [(torch.ones(2),), (torch.ones(2), 3)]:
        with pytest.raises(Disagreement, match="schema"):
            check_returns(norm, results)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [(lambda input: input, "the meta kernel"), (lambda input: (input, input), "the schema says")],
)
def test_a_reference_that_disagrees_fails_its_call(wrong: Callable[..., Any], why: str) -> None:
    call = kernel_of("npu_swiglu", Operator(wrong, None))
    with pytest.raises(Disagreement, match=why):
        call(torch.ones(2, 4, device="npu"), -1)


@pytest.mark.parametrize("name", operators())
def test_every_reference_takes_arguments_of_its_schema(name: str) -> None:
    packet, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.npu, packet), overload or "default")._schema
    known = {argument.name for argument in schema.arguments}
    for function in filter(None, operators()[name]):
        assert function.__annotations__.keys() - {"return"} <= known


#: Operators that the wheel has no meta kernel for; it calls them itself.
NO_META = {"repeat_interleave_backward_tensor", "matmul_double_backward", "npu_format_cast"}


@pytest.mark.parametrize("name", operators())
def test_a_meta_kernel_is_there_to_agree_with(name: str) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "Meta")
    assert has is (name not in NO_META)


def test_the_meta_kernel_that_differs_still_does() -> None:
    (name,) = META_DIFFERS
    x = torch.empty(2, 4, device="meta")
    with pytest.raises((TypeError, RuntimeError)):
        getattr(torch.ops.npu, name)(x[:, :2], x, x[:, :2])


# PyTorch's own operators

PLAIN: dict[str, Callable[[torch.Tensor], Any]] = {
    "argsort": lambda x: x.argsort(-1),
    "where one": lambda x: torch.where(x > 0),
    "one hot": lambda x: F.one_hot((x > 0).long(), 3),
    "histogram of integers": lambda x: torch.histc((x > 0).to(_bins(x)), 2, 0, 1).long(),
    "indexing by a mask": lambda x: x[x > 0],
    "out of nothing": lambda x: torch.add(x, 1, out=torch.empty(0, device=x.device)),
    "in place on a view": lambda x: x.clone()[1:].mul_(2),
    "written through a view": lambda x: _doubled(x.clone()),
    "attention with a float mask": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=(x @ x.mT)
    ),
    "softmax in float32": lambda x: torch.softmax(x.bfloat16(), -1, dtype=torch.float32),
    "saved and loaded": lambda x: _loaded(x),
    "copied": lambda x: copy.deepcopy(x),
}


def _bins(x: torch.Tensor) -> torch.dtype:
    return torch.int64 if x.device.type == "npu" else torch.float32


def _doubled(x: torch.Tensor) -> torch.Tensor:
    x[::2].mul_(2)
    return x


def _loaded(x: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("function", PLAIN.values(), ids=PLAIN)
def test_pytorchs_operator_gives_what_it_gives_on_the_cpu(
    function: Callable[[torch.Tensor], Any],
) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    found, truth = function(x.npu()), function(x)
    pairs = zip(found, truth, strict=True) if isinstance(truth, tuple) else [(found, truth)]
    for ours, theirs in pairs:
        assert ours.device.type == "npu"
        torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize(
    "shapes", [((4,), (4,)), ((3, 4), (4,)), ((4,), (4, 3)), ((2, 3, 4), (2, 4, 3))], ids=str
)
def test_matmul_is_differentiated_twice(shapes: tuple[tuple[int, ...], ...]) -> None:
    def penalty(device: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(s, generator=generator).to(device) for s in shapes]
        for leaf in leaves:
            leaf.requires_grad_()
        first = torch.autograd.grad((leaves[0] @ leaves[1]).pow(2).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))

    for ours, theirs in zip(penalty("npu"), penalty("cpu"), strict=True):
        assert error(ours.cpu(), theirs) <= 1e-6


def test_calls_are_counted_by_name_and_forgotten_on_reset(calls: CALLS) -> None:
    x = torch.ones(2, 4, device="npu")
    npusim.reset_calls()
    torch_npu.npu_swiglu(x + x)
    assert calls() == {"add.Tensor": 1, "npu_swiglu": 1}
    npusim.reset_calls()
    assert calls() == {}


# models


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_model_trains_on_npu_with_the_cpus_losses(name: str) -> None:
    def losses(device: str) -> list[float]:
        model, ids = tiny_model(name).to(device), tokens().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for _ in range(4):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    ours, theirs = losses("npu"), losses("cpu")
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_model_has_the_cpus_logits_and_gradients_on_npu(name: str, calls: CALLS) -> None:
    model, there = tiny_model(name), tiny_model(name).npu()
    truth = outputs_and_gradients(model)
    ids = tokens().npu()
    result = there(ids, labels=ids)
    result.loss.backward()
    found = {"loss": result.loss, "logits": result.logits}
    found |= {name: p.grad for name, p in there.named_parameters() if p.grad is not None}
    assert largest_error({name: t.detach().cpu() for name, t in found.items()}, truth) <= 1e-5
    assert {"rsqrt", "silu", "npu_fusion_attention_v3"} <= calls().keys()


def test_generation_gives_the_cpus_tokens() -> None:
    prompt = tokens(1, 5)
    options = {"max_new_tokens": 5, "do_sample": False}
    truth = tiny_model("llama").generate(prompt, **options)
    found = tiny_model("llama").npu().generate(prompt.npu(), **options)
    assert torch.equal(found.cpu(), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_checkpointing_work_on_npu(dtype: torch.dtype) -> None:
    model, ids = tiny_model("llama").npu().train(), tokens().npu()
    with torch.autocast("npu", dtype=dtype):
        result = checkpoint(model, ids, labels=ids, use_cache=False, use_reentrant=False)
    result.loss.backward()
    assert result.logits.dtype == dtype
    assert all(parameter.grad is not None for parameter in model.parameters())

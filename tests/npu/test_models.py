"""Real models on the device: ten steps of training, generation, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_kernel_patch
from npusim import reset_calls
from tests.support.probes import places
from tests.support.tiny import (
    ARCHITECTURES,
    TRANSFORMERS_5,
    error,
    largest_error,
    layer_ops_of,
    tiny_model,
    tokens,
)

#: Fused operator -> the architectures of two layers and its calls in one forward.
FORWARD = {
    "npu_rms_norm": {
        **dict.fromkeys(("llama", "qwen2", "mixtral"), 5),
        **dict.fromkeys(("qwen3", "qwen3_moe", "gemma2"), 9),
        **dict.fromkeys(("qwen3_next", "qwen3_5"), 8),
    },
    "npu_rotary_mul": {
        **dict.fromkeys(("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2"), 4),
        **dict.fromkeys(("qwen3_next", "qwen3_5"), 2),
    },
    "npu_swiglu": {
        **dict.fromkeys(("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "qwen3_5"), 2),
        "qwen3_next": 4,
    },
    "npu_moe_token_permute": dict.fromkeys(("qwen3_moe", "mixtral", "qwen3_next"), 2),
    "npu_moe_token_unpermute": dict.fromkeys(("qwen3_moe", "mixtral", "qwen3_next"), 2),
}
WANTED = ("llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "mixtral", "gemma2")
NAMES = tuple(name for name in WANTED if name in ARCHITECTURES)
#: Operators of the eager norm, activation and expert loop, and of rotate_half.
EAGER = {"rsqrt", "silu", "one_hot", "nonzero", "index_add_", "index_add", "neg"}
#: What linear attention has of these beside its gated norm, in its one layer: norms of query and
#: key without a weight, and silu after the convolution; and the gate's silu.
LINEAR_ATTENTION = {"rsqrt": 2, "silu": 2}
STEPS = 10


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(name, dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).to(device)


def trained(model: Any) -> list[dict[str, torch.Tensor]]:
    """The loss and every gradient of ten steps of AdamW, on the CPU."""
    # eps: or an element whose gradient is mostly rounding moves by a step as long as any other's.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    found = []
    for step in range(STEPS):
        ids = tokens(seed=step).to(model.device)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({n: t.detach().cpu().clone() for n, t in {**named, "loss": loss}.items()})
    return found


def one_step(model: Any) -> dict[str, torch.Tensor]:
    """Loss, logits and every gradient of one step, on the CPU."""
    ids = tokens().to(model.device)
    result = model(ids, labels=ids)
    result.loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {"loss": result.loss, "logits": result.logits}
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_of_training_agree_with_the_cpus(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    on_cpu = trained(loaded(folder, "cpu"))
    eager = trained(loaded(folder, "npu"))
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("auto", models=name, strict=True) as report:
        inside = trained(loaded(folder, "npu"))
    assert sum(row.served for row in report) > 2 * STEPS
    for one in (eager, inside):
        # Later steps start from parameters that earlier roundings have moved apart.
        assert largest_error(one[0], on_cpu[0]) < 3e-6
        for step, (ours, theirs) in enumerate(zip(one, on_cpu, strict=True)):
            assert error(ours["loss"], theirs["loss"]) < 1e-6, step
            assert largest_error(ours, theirs) < 5e-5, step


@pytest.mark.parametrize("name", NAMES)
def test_every_fused_operator_runs_and_nothing_eager_is_left(
    name: str, calls: Callable[[], dict[str, int]]
) -> None:
    with hf_kernel_patch.patched("auto", models=name, strict=True):
        model = tiny_model(name).to("npu")
        before = calls()
        with torch.no_grad():
            model(tokens().npu())
        ran = {op: n - before.get(op, 0) for op, n in calls().items()}
        before = calls()
        ids = tokens().to("npu")
        model(ids, labels=ids).loss.backward()
        both = {op: n - before.get(op, 0) for op, n in calls().items()}
    for op, counts in FORWARD.items():
        assert ran.get(op, 0) == counts.get(name, 0), op
    norms, turns = FORWARD["npu_rms_norm"][name], FORWARD["npu_rotary_mul"].get(name, 0)
    assert both["npu_rms_norm_backward"] == norms
    assert both.get("npu_rotary_mul", 0) == 2 * turns
    if name not in FORWARD["npu_swiglu"]:
        assert name == "gemma2"  # its MLP has another activation
    elif name not in FORWARD["npu_moe_token_permute"]:
        assert both["npu_swiglu_backward"] == FORWARD["npu_swiglu"][name]
    else:
        layers = FORWARD["npu_moe_token_permute"][name]
        products = 2 if TRANSFORMERS_5 else 0  # float32 lists are multiplied one by one
        assert both.get("npu_grouped_matmul", 0) == (3 * products if products else 3) * layers
        assert both["npu_moe_token_permute_grad"] == layers
        assert both["npu_moe_token_unpermute_grad"] == layers
    left = {op: ran[op] for op in EAGER if ran.get(op)}
    if name in ("qwen3_next", "qwen3_5"):
        assert left.pop("neg") in (1, 2)  # the decay and, before 5.17, a mask; a rotary has 2 more
        assert left == LINEAR_ATTENTION
    else:
        assert not left


@pytest.mark.parametrize("name", NAMES)
def test_generated_tokens_are_the_cpus(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False}
    on_cpu = loaded(folder, "cpu").generate(tokens(), **options)
    hf_kernel_patch.count_calls()
    # By name: generate asks for another implementation of the experts, which "auto" respects.
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True) as report:
        inside = loaded(folder, "npu").generate(tokens().npu(), **options)
    assert torch.equal(inside.cpu(), on_cpu)
    assert [row.op for row in report if row.fallbacks] == ["swiglu"] * (name == "gemma2")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("name", "scaling"),
    [("llama", YARN), ("qwen3", YARN), ("phi3", LONG)],
    ids=["llama-yarn", "qwen3-yarn", "phi3-longrope"],
)
def test_scaled_angles_are_served_and_read_once_a_forward(
    name: str, scaling: dict[str, Any], calls: Callable[[], dict[str, int]]
) -> None:
    options = {"max_new_tokens": 4, "do_sample": False}
    model = tiny_model(name, rope_scaling=scaling, original_max_position_embeddings=16)
    assert model.model.rotary_emb.attention_scaling > 1.1
    on_cpu, generated = one_step(model), model.generate(tokens(), **options)
    model.zero_grad()
    model.to("npu")
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("rope", models=name, strict=True) as report:
        reset_calls()
        inside = one_step(model)
        ran = calls()
        assert torch.equal(model.generate(tokens().npu(), **options).cpu(), generated)
    assert largest_error(inside, on_cpu) < 3e-6
    assert ran["npu_rotary_mul"] == 8
    assert ran["amax"] == 2  # of cos and of sin, for both layers, forward and backward
    assert all(row.served and not row.fallbacks for row in report)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "granite"])
def test_the_loss_without_logits_is_served_in_plain_pytorch(name: str) -> None:
    model = tiny_model(name).train()
    ids = tokens()
    labels = ids.masked_fill(ids % 3 == 0, -100)

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = model(ids.to(model.device), labels=labels.to(model.device)).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {n: t.detach().cpu().clone() for n, t in {**grads, "loss": loss}.items()}

    on_cpu = step()
    model.to("npu")
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("linear_cross_entropy", models=name, strict=True) as report:
        inside = step()
    assert [row.served for row in report] == [1]
    assert largest_error(inside, on_cpu) < 3e-6


@pytest.mark.parametrize("name", NAMES)
def test_unpatch_restores_every_place_and_result(name: str) -> None:
    model = tiny_model(name).to("npu")
    before, eager = places(), one_step(model)
    hf_kernel_patch.patch_transformers("auto", models=name, strict=True)
    assert any(places()[site] is not before[site] for site in before)
    hf_kernel_patch.unpatch()
    model.zero_grad()
    assert all(places()[site] is before[site] for site in before)
    assert largest_error(one_step(model), eager) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "qwen3_next"])
def test_half_precision_is_no_further_from_the_truth_than_eager(
    name: str, dtype: torch.dtype
) -> None:
    model = tiny_model(name, dtype).to("npu")
    eager = one_step(model)
    model.zero_grad()
    with hf_kernel_patch.patched("auto", models=name, strict=True):
        inside = one_step(model)
    truth = one_step(tiny_model(name, dtype).float())
    # Qwen3-Next's own linear attention of 4.57 has gradients in float16 that are NaN.
    finite = [n for n in truth if eager[n].isfinite().all()]
    assert len(finite) > 10
    ours, theirs = (sum(error(f[n], truth[n]) for n in finite) for f in (inside, eager))
    assert ours <= 1.1 * theirs
    assert error(inside["logits"], truth["logits"]) <= 1.1 * error(eager["logits"], truth["logits"])


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen3_next"])
def test_autocast_is_no_further_from_the_truth_than_eager(name: str) -> None:
    model = tiny_model(name).to("npu")
    truth = one_step(tiny_model(name))
    with torch.autocast("npu", dtype=torch.bfloat16):
        eager = one_step(model)
        model.zero_grad()
        hf_kernel_patch.count_calls()
        with hf_kernel_patch.patched("auto", models=name, strict=True) as report:
            inside = one_step(model)
    ours, theirs = (sum(error(f[n], truth[n]) for n in truth) for f in (inside, eager))
    assert ours <= 1.1 * theirs
    assert not any(row.fallbacks for row in report)
    experts = [row for row in report if row.op == "moe" and "decode" not in row.site]
    assert all(row.served for row in experts)

"""Which kernels an NPU gets, one by one and by default, and why none where there is no NPU."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_kernel_patch
from hf_kernel_patch import devices
from tests.support.probes import run_python
from tests.support.tiny import TRANSFORMERS_5, error, tiny_model, tokens

IDS = ("npu_fused_rmsnorm", "npu_fused_rope", "npu_fused_swiglu", "npu_fused_moe")


def forward(model: Any) -> None:
    with torch.no_grad():
        model(tokens().to(model.device))


def test_the_defaults_are_the_four_documented_ids() -> None:
    assert sorted(hf_kernel_patch.get_default_kernels()) == sorted(IDS)


@pytest.mark.parametrize("kernel_id", IDS)
def test_apply_kernel_one_by_one(kernel_id: str, calls: Callable[[], dict[str, int]]) -> None:
    model, other = tiny_model("qwen3_moe").to("npu"), tiny_model("qwen3_moe").to("npu")
    if kernel_id == "npu_fused_swiglu":  # every layer of the other has experts
        model, other = tiny_model("qwen3").to("npu"), tiny_model("qwen3").to("npu")
    assert hf_kernel_patch.apply_kernel(kernel_id, model=model) is model
    operator = {
        "npu_fused_rmsnorm": "npu_rms_norm",
        "npu_fused_rope": "npu_rotary_mul",
        "npu_fused_swiglu": "npu_swiglu",
        "npu_fused_moe": "npu_moe_token_permute",
    }[kernel_id]
    before = calls().get(operator, 0)
    forward(other)
    assert calls().get(operator, 0) == before
    forward(model)
    assert calls()[operator] > before
    hf_kernel_patch.unpatch(model)
    before = calls()[operator]
    forward(model)
    assert calls()[operator] == before


def test_the_gated_norm_comes_with_the_norm(calls: Callable[[], dict[str, int]]) -> None:
    model = tiny_model("qwen3_next").to("npu")
    hf_kernel_patch.count_calls()
    hf_kernel_patch.apply_kernel("npu_fused_rmsnorm", model=model)
    forward(model)
    rows = {row.site.rpartition("Qwen3Next")[2]: row.served for row in hf_kernel_patch.status()}
    hf_kernel_patch.unpatch(model)
    assert rows == {"RMSNorm.forward": 7, "RMSNormGated.forward": 1}
    assert calls()["npu_rms_norm"] == 8


def test_apply_default_kernels_takes_them_all(calls: Callable[[], dict[str, int]]) -> None:
    model = hf_kernel_patch.apply_default_kernels(tiny_model("qwen3_moe").to("npu"), "auto")
    forward(model)
    assert {"npu_rms_norm", "npu_rotary_mul", "npu_moe_token_permute"} <= calls().keys()
    hf_kernel_patch.unpatch(model)


def test_patching_before_the_model_is_moved_serves_it_once_it_is(
    calls: Callable[[], dict[str, int]],
) -> None:
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("auto", models="llama", strict=True) as report:
        model = tiny_model("llama")
        forward(model)
        assert not calls().get("npu_rms_norm")
        assert all(list(row.fallbacks) == ["a tensor is on cpu"] for row in report)
        assert not any(row.served for row in report)
        forward(model.to("npu"))
        assert all(row.served for row in report)
    assert calls()["npu_rms_norm"] == 5


def test_one_model_patched_on_the_cpu_is_served_once_it_is_moved(
    calls: Callable[[], dict[str, int]],
) -> None:
    model = hf_kernel_patch.apply_default_kernels(tiny_model("llama"))
    forward(model)
    assert not calls().get("npu_rms_norm")
    forward(model.to("npu"))
    assert (calls()["npu_rms_norm"], calls()["npu_rotary_mul"], calls()["npu_swiglu"]) == (5, 4, 2)
    hf_kernel_patch.unpatch(model)


def test_a_layer_that_stays_on_the_cpu_falls_back_and_the_others_are_served(
    calls: Callable[[], dict[str, int]],
) -> None:
    model = tiny_model("qwen3_moe").to("npu")
    layer = model.model.layers[1].cpu()

    def moved(device: str) -> Callable[..., Any]:
        def move(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return tuple(move(one) for one in value)
            return value.to(device) if isinstance(value, torch.Tensor) else value

        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            return move(args), {name: move(value) for name, value in kwargs.items()}

        return hook

    layer.register_forward_pre_hook(moved("cpu"), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, out: moved("npu")(module, (out,), {})[0][0])
    with torch.no_grad():
        eager = model(tokens().npu(), use_cache=False).logits.cpu()
        hf_kernel_patch.count_calls()
        with hf_kernel_patch.patched("auto", models="qwen3_moe", strict=True) as report:
            before = calls().get("npu_moe_token_permute", 0)
            inside = model(tokens().npu(), use_cache=False).logits.cpu()
    assert error(inside, eager) < 1e-6
    assert calls()["npu_moe_token_permute"] - before == 1
    for row in report:
        if row.op != "swiglu" and "decode" not in row.site:
            assert row.served
            assert list(row.fallbacks) == ["a tensor is on cpu"]


def test_weights_that_accelerate_keeps_on_the_cpu_are_served_on_the_device() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("qwen3_moe")
    truth = model(tokens()).logits.detach()
    accelerate.cpu_offload(model, execution_device=torch.device("npu:0"))
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("auto", models="qwen3_moe", strict=True) as report:
        inside = model(tokens().npu()).logits.detach().cpu()
    assert error(inside, truth) < 1e-6
    # Experts of a list that have hooks, as transformers 4 has them, are called one by one.
    listed = not TRANSFORMERS_5
    assert [row.op for row in report if row.fallbacks] == ["moe"] * listed
    assert {row.op for row in report if row.served} >= {"rms_norm", "rope"}
    assert listed or sum(row.served for row in report if row.op == "moe") == 2


@pytest.mark.parametrize("scope", ["before it is loaded", "when it is loaded", "this model"])
def test_a_layer_that_the_device_map_puts_on_the_cpu_is_computed_on_the_device(
    scope: str, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    model = tiny_model("qwen3")
    truth = model(tokens()).logits.detach()
    model.save_pretrained(tmp_path)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "npu:0"), "model.layers.1": "cpu"}
    hf_kernel_patch.count_calls()
    if scope == "before it is loaded":
        hf_kernel_patch.patch_transformers(models="qwen3", strict=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    if scope == "when it is loaded":
        hf_kernel_patch.patch_transformers(models="qwen3", strict=True)
    if scope == "this model":
        hf_kernel_patch.apply_default_kernels(loaded)
    assert loaded.hf_device_map["model.layers.1"] == "cpu"
    inside = loaded(tokens().npu()).logits.detach().cpu()
    served = {row.op: row.served for row in hf_kernel_patch.status() if row.served}
    hf_kernel_patch.unpatch()
    assert error(inside, truth) < 1e-6
    assert served == {"rms_norm": 9, "rope": 2, "swiglu": 2}


NO_PACKAGE = "import sys; sys.modules['torch_npu'] = None\n"
ASK = """
import hf_kernel_patch
print(hf_kernel_patch.get_default_kernels())
try:
    hf_kernel_patch.patch_transformers("npu_fused_rope")
except hf_kernel_patch.KernelUnavailableError as error:
    print(error)
try:
    hf_kernel_patch.patch_transformers(backend="npu")
except hf_kernel_patch.KernelUnavailableError as error:
    print(error)
"""


NO_DEVICE = "from npusim import build; build.preload()\n"


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (NO_PACKAGE + ASK, "the package torch_npu is not installed"),
        (ASK, "torch_npu is not usable (ImportError"),
        (NO_DEVICE + ASK, "no npu device: the accelerator in use here is 'cpu'"),
    ],
    ids=["without torch_npu", "without CANN", "without a device"],
)
def test_the_reason_is_named_where_there_is_no_device(program: str, why: str) -> None:
    done = run_python(program, TORCH_DEVICE_BACKEND_AUTOLOAD="0", NPUSIM_DEVICES="0")
    defaults, *reasons = done.stdout.splitlines()[-3:]  # torch_npu has warnings for the output
    assert not set(IDS) & set(ast.literal_eval(defaults)), done.stderr
    assert len(reasons) == 2, done.stderr
    assert all(why in reason for reason in reasons)


def test_the_reason_is_named_where_the_accelerator_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "current", lambda: "cuda")
    with pytest.raises(hf_kernel_patch.KernelUnavailableError, match="in use here is 'cuda'"):
        hf_kernel_patch.patch_transformers("npu_fused_moe")

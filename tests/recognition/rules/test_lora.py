"""Adapters of PEFT on real models: what they give patched and not, and what happens to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_kernel_patch
from tests.support.adapters import KERNEL, step, tuned
from tests.support.probes import fallbacks, served
from tests.support.tiny import error, largest_error, tiny_model, tokens

peft = pytest.importorskip("peft")

#: How far losses and gradients in float32 may be apart, by sums in another order.
CLOSE = 2e-5
pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def patched_step(model: Any, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    with hf_kernel_patch.patched(KERNEL, models="peft") as report:
        return step(model, **options), report


def uncounted_step(model: Any) -> None:
    hf_kernel_patch.count_calls(False)
    step(model)
    hf_kernel_patch.count_calls()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "biases": {"bias": "all"},
    "dora": {"use_dora": True},
    "dora and dropout": {"use_dora": True, "lora_dropout": 0.3},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without biases and with
def test_a_step_is_the_original_s(name: str, options: dict[str, Any]) -> None:
    model = tuned(name, **options)
    before = step(model)
    found, report = patched_step(model)
    assert largest_error(found, before) < CLOSE
    assert served(report) == 14 and not fallbacks(report)
    again = step(model)
    assert all(torch.equal(again[key], before[key]) for key in before), "unpatched again"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2],
    ids=str,
)
def test_no_further_from_the_truth_in_half_precision(
    base: torch.dtype, adapter: torch.dtype, autocast: bool, options: dict[str, Any]
) -> None:
    model = tuned(dtype=base, **options)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    truth = step(copy.deepcopy(model).double())
    eager = step(model, autocast=autocast)
    found, report = patched_step(model, autocast=autocast)
    assert served(report) == 14
    assert {key: one.dtype for key, one in found.items()} == {k: e.dtype for k, e in eager.items()}

    def total(run: dict[str, torch.Tensor]) -> float:
        return sum(error(run[key], truth[key]) ** 2 for key in truth) ** 0.5

    # Over eight draws of the weights ours is nearer in the mean; one draw may be off by 1.2.
    assert total(found) <= 1.3 * total(eager) + 1e-6


def test_adapters_side_by_side() -> None:
    model = tuned()
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    before = step(model)
    found, report = patched_step(model)
    assert largest_error(found, before) < CLOSE
    assert served(report) == 14 and not fallbacks(report)


def frozen(part: str) -> Callable[[Any], None]:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.requires_grad_(False)

    return freeze


def trainable(model: Any) -> None:
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)


@pytest.mark.parametrize("change", [frozen("lora_A"), frozen("lora_B"), trainable])
def test_what_is_trained_may_be_chosen(change: Callable[[Any], None]) -> None:
    model = tuned()
    change(model)
    before = step(model)
    found, report = patched_step(model)
    assert largest_error(found, before) < CLOSE
    assert served(report) == 14


def other(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")


def deleted(model: Any) -> None:
    other(model)
    model.delete_adapter("default")


def back(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


#: What is done to a patched model -> how many layers have adapters to compute afterwards.
LATER: dict[str, tuple[Callable[[Any], Any], int]] = {
    "merged": (lambda model: model.merge_adapter(), 0),
    "merged and back": (back, 14),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), 0),
    "switched": (other, 2),
    "deleted": (deleted, 2),
    "scaled": (
        lambda model: model.base_model.model.model.layers[0].mlp.up_proj.set_scale("default", 3.0),
        14,
    ),
}


@pytest.mark.parametrize(("change", "layers"), LATER.values(), ids=LATER)
def test_what_is_done_to_adapters_later(change: Callable[[Any], Any], layers: int) -> None:
    model, twin = tuned(), tuned()
    with hf_kernel_patch.patched(KERNEL, models="peft") as report:
        uncounted_step(model)
        torch.manual_seed(7)
        change(model)
        found = step(model)
        assert served(report) == layers
    torch.manual_seed(7)
    change(twin)
    assert largest_error(found, step(twin)) < CLOSE


def hooked(part: Any) -> None:
    part.register_forward_hook(lambda module, given, result: result * 2)


def forward_set(part: Any) -> None:
    original = part.forward
    part.forward = lambda *args, **kwargs: original(*args, **kwargs) + 1


@pytest.mark.parametrize("change", [hooked, forward_set])
@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("base_layer", ""),
        ("lora_dropout.default", ""),
        ("lora_A.default", "hooked or of its own kind"),
        ("lora_B.default", "hooked or of its own kind"),
    ],
)
def test_parts_that_somebody_changes_later(
    change: Callable[[Any], None], where: str, reason: str
) -> None:
    model = tuned(target_modules=["up_proj"])
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    with hf_kernel_patch.patched(KERNEL, models="peft") as report:
        uncounted_step(model)
        change(layer.get_submodule(where))
        found = step(model)
        assert served(report) == (1 if reason else 2)
        assert all(reason in one for one in fallbacks(report))
    assert largest_error(found, step(model)) < CLOSE


def test_another_forward_on_linear_itself_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(target_modules=["up_proj"])
    original = nn.Linear.forward
    with hf_kernel_patch.patched(KERNEL, models="peft"):
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: original(self, x) * 2)
        found = step(model)
    assert largest_error(found, step(model)) < CLOSE


def test_batches_with_an_adapter_for_each_row_are_the_original_s() -> None:
    model = tuned().eval()
    names = ["default", "__base__"]
    before = model(input_ids=tokens(), adapter_names=names).logits
    with hf_kernel_patch.patched(KERNEL, models="peft"):
        assert torch.equal(model(input_ids=tokens(), adapter_names=names).logits, before)


def test_one_model_alone() -> None:
    model, bystander = tuned(), tuned()
    before, original = step(model), type(bystander.base_model.model.model.layers[0].mlp.up_proj)
    hf_kernel_patch.apply_kernel(KERNEL, model=model)
    assert type(bystander.base_model.model.model.layers[0].mlp.up_proj) is original
    assert type(model.base_model.model.model.layers[0].mlp.up_proj) is not original
    assert largest_error(step(model), before) < CLOSE
    hf_kernel_patch.unpatch(model)
    assert type(model.base_model.model.model.layers[0].mlp.up_proj) is original


def test_adapters_that_are_added_while_patched() -> None:
    with hf_kernel_patch.patched(KERNEL, models="peft") as report:
        model = tuned()
        found = step(model)
        assert served(report) == 14
    assert largest_error(found, step(model)) < CLOSE


def test_saved_and_loaded_while_patched(tmp_path: Path) -> None:
    model = tuned(use_dora=True)
    before = step(model)
    with hf_kernel_patch.patched(KERNEL, models="peft"):
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
        assert largest_error(step(again), before) < CLOSE


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpointed_layers(reentrant: bool) -> None:
    model = tuned(lora_dropout=0.3).train()
    model.enable_input_require_grads()
    before = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, report = patched_step(model)
    assert largest_error(found, before) < CLOSE
    assert served(report) == 28, "each layer runs again in the backward"


def test_a_compiled_layer_is_the_original_s() -> None:
    model = tuned(target_modules=["up_proj"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    before = layer(x)
    with hf_kernel_patch.patched(KERNEL, models="peft") as report:
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), before)
        assert list(fallbacks(report)) == ["torch.compile fuses the original itself"]


def test_an_input_that_is_changed_in_place_afterwards() -> None:
    """What a layer gives may be added to in place, as that of the original may."""
    model = tuned(target_modules=["up_proj"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    with hf_kernel_patch.patched(KERNEL, models="peft"):
        layer(x).add_(1).sum().backward()
    assert x.grad is not None


def test_kinds_of_layers_that_are_not_served_are_named() -> None:
    tuned()
    with hf_kernel_patch.patched(KERNEL, models="peft") as report:
        rows = {row.site.removeprefix("peft.tuners.lora."): row for row in report}
        assert rows["layer.Linear.forward"].outcome == "patched"
        assert rows["layer._ConvNd.forward"].outcome == "skipped"
        assert "other code than is known" in rows["layer._ConvNd.forward"].reason


def test_peft_is_named_as_a_model() -> None:
    with pytest.raises(ValueError, match="did you mean 'peft'"):
        hf_kernel_patch.patch_transformers(KERNEL, models="pefft")

"""``verify``: a site that is wrong is named, and no other; one that is right is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import KernelPatchError, registry, verify
from hf_kernel_patch.kernels import register_kernel
from hf_kernel_patch.verifying import Verdict
from tests.support.probes import NORM, ROPE, SWIGLU
from tests.support.tiny import having, tiny_model, tokens

MODELLING = "transformers.models.llama.modeling_llama."
LOSS = "torch_fused_linear_cross_entropy"
ADD = "torch_fused_add_rmsnorm"


class Wrong(torch.autograd.Function):
    """The identity, but for a factor of the result, or of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, result: float, gradient: float) -> torch.Tensor:
        ctx.gradient = gradient
        return x * result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.gradient, None, None


@pytest.fixture
def wrong() -> Iterator[Callable[..., str]]:
    """Registers a kernel that is another one's with a wrong result or gradient."""
    made = []

    def register(like: str, result: float = 1.0, gradient: float = 1.0, fails: bool = False) -> str:
        right = registry.kernels()[like]

        def function(*arguments: Any, **named: Any) -> Any:
            if fails:
                raise ZeroDivisionError("the kernel is wrong")
            found = right.load()(*arguments, **named)
            if isinstance(found, tuple):
                return (Wrong.apply(found[0], result, gradient), *found[1:])
            return Wrong.apply(found, result, gradient)

        name = f"wrong_{like}"
        register_kernel(
            type("Wrong", (right,), {"kernel_id": name, "function": staticmethod(function)})
        )
        made.append(name)
        return name

    yield register
    for name in made:
        del registry.kernels()[name]


def batch(**more: Any) -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens(), **more}


def llama_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return tiny_model("llama", dtype, **changes)


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_that_are_right_are_no_further_from_the_truth(dtype: torch.dtype) -> None:
    asked = f"{NORM},{ROPE},{SWIGLU},{LOSS},{ADD}"
    found = verify(llama_of(dtype), batch(), asked, models="llama")
    assert found.ok and not found.sites
    assert {row.verdict for row in found.rows} == {Verdict.RIGHT}
    norms = found.by_site()[f"{MODELLING}LlamaRMSNorm.forward"]
    assert [row.layer for row in norms] == [0, 0, 1, 1, None]
    assert norms[0].module == "model.layers.0.input_layernorm"
    assert all(row.output and row.gradient for row in found.rows)
    names = [one.name for one in found.whole]
    assert names[:2] == ["loss", "logits"] and names[2].startswith("after model.layers.")
    assert "5 of 5 sites verified: no further from the truth than eager" in str(found)


@pytest.mark.parametrize(
    ("like", "site"),
    [
        (NORM, "LlamaRMSNorm.forward"),
        (ROPE, "apply_rotary_pos_emb"),
        (SWIGLU, "LlamaMLP.forward"),
        (ADD, "LlamaDecoderLayer.forward"),
    ],
)
@pytest.mark.parametrize("what", ["result", "gradient"])
def test_a_kernel_that_is_off_by_a_hundredth_is_named_and_no_other(
    wrong: Callable[..., str], like: str, site: str, what: str
) -> None:
    others = [one for one in (NORM, ROPE, SWIGLU, ADD, LOSS) if one != like]
    bad = wrong(like, **{what: 1.01})
    found = verify(llama_of(), batch(), [bad, *others], models="llama")
    assert found.sites == (MODELLING + site,) and not found.ok
    assert found.exclude == MODELLING + site
    for row in found.worse:
        assert row.kernels == (bad,)
        assert {one.gradient for one in row.measures if one.worse} >= {what == "gradient"}
    if what == "gradient":
        assert all(not one.worse for row in found.worse for one in row.measures if not one.gradient)
    assert f"worse: {found.worse[0].module} by {bad}" in str(found)
    assert any(one.worse for one in found.whole)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("name", "like"),
    [("mixtral", "torch_fused_moe"), ("qwen3", "torch_fused_qk_norm_rope"), ("qwen2", LOSS)],
)
@pytest.mark.parametrize("what", ["result", "gradient"])
def test_a_larger_kernel_that_is_off_is_named_and_no_other(
    wrong: Callable[..., str], name: str, like: str, what: str
) -> None:
    bad = wrong(like, **{what: 1.01})
    others = [one for one in (NORM, ADD, LOSS) if one != like]
    found = verify(tiny_model(name), batch(), [bad, *others], models=name, whole=False)
    assert len(found.sites) == 1 and all(row.kernels == (bad,) for row in found.worse)


def test_a_loss_s_wrong_gradient_is_that_of_the_head(wrong: Callable[..., str]) -> None:
    bad = wrong(LOSS, gradient=1.01)
    (row,) = verify(llama_of(), batch(), bad, models="llama", whole=False).worse
    assert row.site == f"{MODELLING}LlamaForCausalLM.forward" and row.module == ""
    assert {one.name for one in row.measures if one.worse} == {"output of model", "lm_head.weight"}


def test_one_module_that_is_off_is_named_and_none_after_it() -> None:
    model, right = llama_of(num_hidden_layers=3), registry.kernels()[NORM]
    chosen = model.model.layers[1].post_attention_layernorm.weight

    def function(x: torch.Tensor, weight: torch.Tensor, *more: Any) -> torch.Tensor:
        return right.load()(x, weight, *more) * (1.01 if weight is chosen else 1.0)

    members = {"kernel_id": "wrong_once", "function": staticmethod(function)}
    register_kernel(type("WrongOnce", (right,), members))
    try:
        found = verify(model, batch(), ["wrong_once", SWIGLU], models="llama")
    finally:
        del registry.kernels()["wrong_once"]
    (row,) = found.worse
    assert row.module == "model.layers.1.post_attention_layernorm" and row.layer == 1
    assert "WORSE in 1 of 7, most in model.layers.1.post_attention_layernorm" in str(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wrong_kernel_is_named_in_half_precision(
    wrong: Callable[..., str], dtype: torch.dtype
) -> None:
    bad = wrong(SWIGLU, gradient=1.05)
    found = verify(llama_of(dtype), batch(), [bad, NORM], models="llama", whole=False)
    assert found.sites == (f"{MODELLING}LlamaMLP.forward",)


def test_a_kernel_that_fails_is_worse(wrong: Callable[..., str]) -> None:
    found = verify(llama_of(), batch(), [wrong(NORM, fails=True), SWIGLU])
    assert found.sites == (f"{MODELLING}LlamaRMSNorm.forward",)
    assert "it fails: ZeroDivisionError: the kernel is wrong" in found.worse[0].reason
    assert found.note == "patched, it fails: ZeroDivisionError: the kernel is wrong"
    assert not found.ok and json.loads(found.to_json())["whole"][0]["ours"] is None


def test_results_that_are_no_numbers_are_worse(wrong: Callable[..., str]) -> None:
    found = verify(llama_of(), batch(), [wrong(SWIGLU, result=float("nan")), NORM])
    assert found.sites == (f"{MODELLING}LlamaMLP.forward",)
    assert json.loads(found.to_json())["ok"] is False


def test_the_factor_says_what_is_worse(wrong: Callable[..., str]) -> None:
    model, bad = llama_of(torch.bfloat16), wrong(SWIGLU, result=1.02)
    assert not verify(model, batch(), bad, whole=False, factor=1).ok
    assert verify(model, batch(), bad, whole=False, factor=20).ok
    for factor in (0.5, True, "3", float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factor is a number of at least 1"):
            verify(model, batch(), bad, factor=factor)  # type: ignore[arg-type]


@pytest.mark.versions
@pytest.mark.parametrize("name", [one for one in ("mixtral", "gpt_oss") if one in having("moe")])
def test_experts_are_seen_as_eager_has_chosen_them(name: str) -> None:
    model = tiny_model(name, torch.bfloat16)
    found = verify(model, batch(), "torch_fused_moe,torch_fused_add_rmsnorm", models=name)
    assert found.ok, str(found)
    served = {kernel for row in found.rows if row.measures for kernel in row.kernels}
    assert "torch_fused_moe" in served


def test_of_many_that_are_worse_the_worst_are_told(wrong: Callable[..., str]) -> None:
    model = llama_of(num_hidden_layers=6)
    found = verify(model, batch(), wrong(NORM, result=1.01), models="llama", whole=False)
    assert len(found.worse) == 13
    lines = [line for line in str(found).splitlines() if line.startswith("worse: ")]
    assert len(lines) == 9 and lines[-1] == "worse: 5 modules more, see rows or --json"


def test_what_falls_back_is_no_verdict_and_says_why() -> None:
    found = verify(llama_of(), batch(), [LOSS], train=False)
    (row,) = found.rows
    assert row.verdict is Verdict.NOT_SERVED
    assert row.reason == "evaluation: the logits are wanted" and found.ok
    assert "nothing was verified" in str(found) and "not served: evaluation" in str(found)


def test_nothing_to_verify_is_said() -> None:
    found = verify(tiny_model("llama"), batch(), SWIGLU, models="qwen3")
    assert not found.rows and found.ok and not found.whole
    assert str(found).startswith("nothing to verify: no site of this model was patched")


def test_a_batch_without_labels_has_a_verdict_of_its_sites() -> None:
    found = verify(llama_of(), {"input_ids": tokens()}, NORM)
    assert found.ok and all(row.gradient for row in found.rows)
    assert found.whole[0].name == "logits"


@pytest.mark.parametrize("layers", [1, 4])
def test_layers_are_looked_at_a_few_at_a_time(layers: int) -> None:
    said: list[str] = []
    model = llama_of(num_hidden_layers=3)
    found = verify(model, batch(), NORM, whole=False, layers_at_once=layers, progress=said.append)
    assert len(found.rows) == 7 and found.ok
    assert len([line for line in said if line.startswith("sites, part")]) == (
        4 if layers == 1 else 2
    )


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ("a model", TypeError, "expected a transformers PreTrainedModel"),
        (torch.nn.Linear(2, 2), TypeError, "expected a transformers PreTrainedModel"),
    ],
)
def test_what_is_no_model(given: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        verify(given, batch())


def test_a_batch_that_the_model_does_not_take() -> None:
    with pytest.raises(KernelPatchError, match="LlamaForCausalLM cannot be run on this batch"):
        verify(llama_of(), {"pixels": torch.ones(1)}, NORM)
    with pytest.raises(TypeError, match="batch maps the names"):
        verify(llama_of(), tokens(), NORM)  # type: ignore[arg-type]
    assert not hf_kernel_patch.status().rows


def test_what_is_patched_already_is_no_original() -> None:
    model = llama_of()
    hf_kernel_patch.apply_kernel(NORM, model=model)
    try:
        with pytest.raises(KernelPatchError, match="something is patched already"):
            verify(model, batch(), NORM)
    finally:
        hf_kernel_patch.unpatch(model)


def test_a_model_without_weights() -> None:
    with pytest.raises(KernelPatchError, match="meta device"):
        verify(llama_of().to("meta"), batch(), NORM)


def test_a_rotary_embedding_that_grows_is_small_again() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0}
    model = tiny_model("llama", max_position_embeddings=8, rope_scaling=rope)
    rotary = model.model.rotary_emb
    before = {name: str(value) for name, value in vars(rotary).items()}
    assert verify(model, {"input_ids": tokens(1, 24)}, NORM, models="llama").rows
    assert {name: str(value) for name, value in vars(rotary).items()} == before

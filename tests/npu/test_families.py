"""Forty families of tests/families on the device: one step of training, with the CPU's gradients.

Left out, as the simulated device cannot run them: DeepSeek-V2 and Llama 4, whose rotary is a
product of complex numbers (its memory knows no conjugated views, so eager's gradients are wrong
there too). Mllama and Gemma 4 are trained on text alone in that list. Kimi Linear takes 7 seconds
on the CPU already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import hf_kernel_patch
from tests.families import record
from tests.families.building import Case, inputs_of, reset_seeds, tiny_model
from tests.families.cases import CASES
from tests.families.run import TIMES
from tests.npu.device import KERNELS
from tests.support.tiny import error

pytestmark = pytest.mark.skipif(
    transformers.__version__ != record.TRANSFORMERS,
    reason="families come and go with the version, and the record is of one",
)

#: What is in a family -> classes of the list.
CHOSEN = {
    # Norms: Llama's, Gemma's, after the layer, without a weight, of T5, LayerNorm; MLP with silu
    # and gelu; rotary of halves and neighbours, full and partial, none.
    "dense": """
        CohereForCausalLM Ernie4_5ForCausalLM Gemma2ForCausalLM GlmForCausalLM GPTJForCausalLM
        GPTNeoXForCausalLM GraniteForCausalLM HeliumForCausalLM LlamaForCausalLM
        MiniCPM3ForCausalLM NanoChatForCausalLM Olmo2ForCausalLM Phi3ForCausalLM Qwen2ForCausalLM
        Qwen3ForCausalLM SmolLM3ForCausalLM StableLmForCausalLM T5ForConditionalGeneration
        T5GemmaForConditionalGeneration
    """,
    "experts": """
        DeepseekV3ForCausalLM Glm4MoeForCausalLM GptOssForCausalLM MiniMaxM2ForCausalLM
        MixtralForCausalLM OlmoeForCausalLM PhimoeForCausalLM Qwen3MoeForCausalLM
    """,
    "images": """
        Gemma3ForConditionalGeneration GlmOcrForConditionalGeneration
        Idefics2ForConditionalGeneration InternVLForConditionalGeneration
        LlavaForConditionalGeneration Mistral3ForConditionalGeneration
        Qwen2_5_VLForConditionalGeneration Qwen2VLForConditionalGeneration
    """,
    "hybrid": """
        BambaForCausalLM FalconH1ForCausalLM JambaForCausalLM Qwen3NextForCausalLM
        Zamba2ForCausalLM
    """,
}
NAMES = [name for names in CHOSEN.values() for name in names.split()]
HERE = [case for case in CASES if case.name in NAMES]

#: Op -> why its calls may go to the original.
REASONS = {
    # torch_npu has no operator for a gated gelu of which its page says what half it activates.
    "swiglu": {
        "npu_swiglu computes silu, not gelu",
        "npu_swiglu computes silu, not gelu_tanh",
    },
    # GPT-OSS has biases and a clamped gate, npu_fused_moe two products and npu_swiglu between.
    "moe": {"the kernel computes no biases and no gate of the experts' own"},
    # GLM-OCR's text turns pairs of neighbours by positions in an image, which rows do not share.
    "rope": {
        "npu_rotary_mul takes pairs of neighbours for cos and sin of all sequences, "
        "and sequences times heads under 1000"
    },
    # InternVL's tower has a LayerNorm where others have an RMSNorm.
    "add_rms_norm": {"LayerNorm is not a norm of a known leaf"},
}
#: An op of the record without a kernel here -> those that serve its parts.
PARTS: dict[str, set[str]] = {"qk_norm_rope": {"rms_norm", "rope"}, "linear_cross_entropy": set()}

#: As in test_models.
LOSS, GRADIENT = 1e-6, 3e-6

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def plain_formats() -> Iterator[None]:
    """Without compiling operators on the fly ``Module.to`` leaves weights of convolutions as they
    are; otherwise it casts them to blocked formats, which the simulated device does not have."""
    before = torch.npu.is_jit_compile_false()
    torch.npu.set_compile_mode(jit_compile=False)
    yield
    torch.npu.set_compile_mode(jit_compile=not before)


@pytest.mark.parametrize("case", HERE, ids=[case.id for case in HERE])
def test_family_trains_as_on_the_cpu(case: Case) -> None:
    model = tiny_model(case)
    inputs = inputs_of(case, model)
    on_cpu = step(model, inputs)
    model = tiny_model(case).to("npu")
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(tuple(KERNELS.values())) as report:
        inside = step(model, {name: tensor.to("npu") for name, tensor in inputs.items()})
    far = differences(case, inputs, inside, on_cpu)
    assert not far, "\n".join(far)

    served = {row.op for row in report if row.served and row.kernel == KERNELS[row.op]}
    back = {(row.op, reason) for row in report for reason in row.fallbacks}
    odd = {(op, reason) for op, reason in back if reason not in REASONS.get(op, ())}
    assert not odd, f"fallbacks: {odd}"
    left = expected(case) - served - {op for op, _ in back}
    assert not left, f"no longer served: {left}"
    assert served


def test_forty_families_are_chosen() -> None:
    assert len(HERE) == len(NAMES) == len({case.family for case in HERE}) == 40


def expected(case: Case) -> set[str]:
    """Ops with a kernel here that the record has for the case."""
    recorded = record.load()[case.family][case.name]["served"]
    return set().union(*(PARTS.get(op, {op}) for op in recorded))


def step(model: Any, inputs: dict[str, Any]) -> Tensors:
    """The loss and every gradient of one step, on the CPU."""
    reset_seeds()
    loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach().cpu().clone() for name, t in {"loss": loss, **found}.items()}


def differences(case: Case, inputs: Tensors, inside: Tensors, on_cpu: Tensors) -> list[str]:
    """What is further from the CPU's than rounding, in words.

    Two roundings may lie further apart than ``GRADIENT`` where terms of a gradient cancel: in
    those of keys' biases, which are nothing but rounding, and behind routers. There, as in
    tests/families, the step in float64 decides: ours may be ``TIMES`` as far from it as the CPU's,
    and ``GRADIENT``.
    """
    if inside.keys() != on_cpu.keys():
        return [f"not in both: {', '.join(sorted(inside.keys() ^ on_cpu.keys()))}"]
    found = []
    if not error(inside["loss"], on_cpu["loss"]) < LOSS:  # NaN is far, here and below
        found.append(f"loss: {inside['loss']}, the CPU's {on_cpu['loss']}")
    far = [n for n in on_cpu if n != "loss" and not error(inside[n], on_cpu[n]) < GRADIENT]
    truth = in_float64(case, inputs) if far else {}
    for name in far:
        ours, eager = (error(one[name], truth[name]) for one in (inside, on_cpu))
        if not ours <= TIMES * eager + GRADIENT:
            found.append(
                f"{name}: {error(inside[name], on_cpu[name]):.1e} from the CPU's; "
                f"{ours:.1e} from the step in float64, the CPU's {eager:.1e}"
            )
    return found


def in_float64(case: Case, inputs: Tensors) -> Tensors:
    model = tiny_model(case, torch.float64)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped products take no float64
    return step(model, {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})

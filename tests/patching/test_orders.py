"""Every order of importing, building, patching and unpatching."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch.patching import watching
from hf_kernel_patch.patching.ledger import ledger
from tests.support.probes import (
    LAYERS,
    MOE,
    NORM,
    ROPE,
    SWIGLU,
    changed,
    llama,
    logits,
    places,
    run_python,
    served,
    watched_kernel,
)
from tests.support.tiny import ARCHITECTURES, TRANSFORMERS_5, modelling, tiny_model

PATCHED_LLAMA = {
    NORM: "LlamaRMSNorm.forward",
    ROPE: "apply_rotary_pos_emb",
    SWIGLU: "LlamaMLP.forward",
}


@pytest.fixture
def before() -> Iterator[dict[str, Any]]:
    """All places of Llama and its kin; every test here ends with the objects that were there."""
    for name in ("llama", "qwen2", "qwen3_moe"):
        modelling(name)
    objects = places()
    yield objects
    assert changed(objects) == set()


PROGRAM = """
import sys
import hf_kernel_patch
{patch}
assert "torch" not in sys.modules and "transformers" not in sys.modules
report = hf_kernel_patch.status()
assert [row.outcome for row in report] == ["pending"] * 2, report
from transformers.models.llama import modeling_llama as m
assert [row.outcome for row in report] == ["patched"] * 2, report
ours = m.LlamaRMSNorm.forward.__hf_kernel_patch__
assert all(site.active for site in ours.sites.values())
config = m.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8,
                       num_attention_heads=2, num_key_value_heads=2)
import torch
model, ids = m.LlamaForCausalLM(config), torch.arange(4)[None]
inside = model(ids).logits
assert {{row.op: row.served for row in report}} == {{"rms_norm": 3, "rope": 1}}, report
ours = m.LlamaRMSNorm.forward, m.apply_rotary_pos_emb
hf_kernel_patch.unpatch()
theirs = m.LlamaRMSNorm.forward, m.apply_rotary_pos_emb
assert theirs == tuple(value.__hf_kernel_patch__.original for value in ours)
assert torch.equal(model(ids).logits, inside)
print("done")
"""


@pytest.mark.parametrize(
    ("patch", "variables"),
    [
        (
            "hf_kernel_patch.count_calls()\n"
            f"hf_kernel_patch.patch_transformers('{NORM},{ROPE}', models='llama')",
            {},
        ),
        (
            "",
            {
                "HF_KERNEL_PATCH": f"{NORM},{ROPE}",
                "HF_KERNEL_PATCH_MODELS": "llama",
                "HF_KERNEL_PATCH_BACKEND": "torch",
                "HF_KERNEL_PATCH_STRICT": "1",
                "HF_KERNEL_PATCH_COUNT": "1",
            },
        ),
    ],
    ids=["by a call", "by the environment"],
)
def test_patch_then_import_transformers(patch: str, variables: dict[str, str]) -> None:
    done = run_python(PROGRAM.format(patch=patch), **variables)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_import_then_patch(before: dict[str, Any]) -> None:
    report = hf_kernel_patch.patch_transformers(LAYERS, models="llama")
    assert [row.outcome for row in report] == ["patched"] * 3
    assert changed(before) == set(PATCHED_LLAMA.values())
    hf_kernel_patch.unpatch()


def test_patching_imports_no_modelling_code() -> None:
    loaded = set(sys.modules)
    with hf_kernel_patch.patched((*LAYERS, MOE)):
        new = {name for name in sys.modules if name not in loaded}
    assert not {name for name in new if name.startswith("transformers.models.")}


def test_build_patch_build(before: dict[str, Any]) -> None:
    first = tiny_model("llama")
    eager = logits(first)
    report = hf_kernel_patch.patch_transformers(LAYERS, models="llama", strict=True)
    second = tiny_model("llama")
    hf_kernel_patch.count_calls()
    for model, calls in ((first, 9), (second, 18)):
        assert torch.equal(logits(model), eager)
        assert served(report) == calls
    hf_kernel_patch.unpatch()
    for model in (first, second, tiny_model("llama")):
        assert torch.equal(logits(model), eager)
    assert served(report) == 18


def test_a_second_equal_call_does_nothing(before: dict[str, Any]) -> None:
    first = hf_kernel_patch.patch_transformers((NORM, ROPE), models="llama")
    once, entries = places(), dict(ledger._stacks)
    second = hf_kernel_patch.patch_transformers(f"{NORM}, {ROPE}", models=["llama"], strict=False)
    assert second.rows is first.rows
    assert changed(once) == set()
    assert len(watching.active) == 1
    assert ledger._stacks == entries
    assert all(len(stack) == 1 for stack in entries.values())
    hf_kernel_patch.unpatch()


def test_a_different_call_replaces_the_first(before: dict[str, Any]) -> None:
    hf_kernel_patch.patch_transformers(NORM, models="llama")
    hf_kernel_patch.patch_transformers(ROPE, models="llama")
    assert changed(before) == {"apply_rotary_pos_emb"}
    assert {row.op for row in hf_kernel_patch.status()} == {"rope"}
    hf_kernel_patch.patch_transformers(None)
    assert changed(before) == set()


def test_a_different_call_that_fails_leaves_the_first(before: dict[str, Any]) -> None:
    first = hf_kernel_patch.patch_transformers(NORM, models="llama")
    with pytest.raises(ValueError, match="unknown"):
        hf_kernel_patch.patch_transformers("ropee", models="llama")
    with pytest.raises(hf_kernel_patch.KernelPatchError, match="found no site"):
        hf_kernel_patch.patch_transformers(MOE, models="llama", strict=True)
    assert changed(before) == {"LlamaRMSNorm.forward"}
    assert hf_kernel_patch.status().rows == first.rows
    hf_kernel_patch.unpatch()


def test_nested_blocks_with_other_arguments(before: dict[str, Any]) -> None:
    with hf_kernel_patch.patched(NORM, models="llama"):
        with hf_kernel_patch.patched((NORM, ROPE), models=("llama", "qwen2")):
            assert changed(before) == {
                "LlamaRMSNorm.forward",
                "apply_rotary_pos_emb",
                "Qwen2RMSNorm.forward",
            }
        assert changed(before) == {"LlamaRMSNorm.forward"}
    assert changed(before) == set()


def test_the_inner_block_is_in_force_and_then_the_outer_again(before: dict[str, Any]) -> None:
    model = tiny_model("llama")
    with watched_kernel("outer") as outer, watched_kernel("inner") as inner:
        with hf_kernel_patch.patched("outer", models="llama"):
            with hf_kernel_patch.patched("inner", models="llama"):
                logits(model)
                assert (outer.calls, inner.calls) == (0, 5)
            logits(model)
            assert (outer.calls, inner.calls) == (5, 5)
        logits(model)
        assert (outer.calls, inner.calls) == (5, 5)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_blocks_left_in_any_order(order: tuple[int, ...], before: dict[str, Any]) -> None:
    model = tiny_model("llama")
    with watched_kernel("a") as a, watched_kernel("b") as b, watched_kernel("c") as c:
        kernels = [a, b, c]
        blocks = [hf_kernel_patch.patched(k.kernel_id, models="llama") for k in kernels]
        for block in blocks:
            block.__enter__()
        remaining = [0, 1, 2]
        for index in order:
            counts = [kernel.calls for kernel in kernels]
            logits(model)
            counts[remaining[-1]] += 5
            assert [kernel.calls for kernel in kernels] == counts
            blocks[index].__exit__(None, None, None)
            remaining.remove(index)
        assert changed(before) == set()


@pytest.mark.parametrize("first", [0, 1])
def test_equal_blocks_left_in_any_order(first: int, before: dict[str, Any]) -> None:
    blocks = [hf_kernel_patch.patched(LAYERS, models="llama") for _ in range(2)]
    for block in blocks:
        block.__enter__()
    blocks[first].__exit__(None, None, None)
    assert changed(before) == set(PATCHED_LLAMA.values())
    model = tiny_model("llama", num_hidden_layers=1)
    hf_kernel_patch.count_calls()
    logits(model)
    assert served(hf_kernel_patch.status()) == 5
    blocks[1 - first].__exit__(None, None, None)


def test_an_exception_inside_passes_and_everything_is_back(before: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="inside"), hf_kernel_patch.patched(LAYERS, models="llama"):
        assert changed(before)
        raise KeyError("inside")
    assert changed(before) == set()


def test_unpatch_twice_and_with_nothing_patched(before: dict[str, Any]) -> None:
    hf_kernel_patch.unpatch()
    hf_kernel_patch.patch_transformers(NORM, models="llama")
    hf_kernel_patch.unpatch()
    hf_kernel_patch.unpatch()
    assert changed(before) == set()


def test_unpatch_inside_a_block_ends_it_early(before: dict[str, Any]) -> None:
    with hf_kernel_patch.patched(NORM, models="llama"):
        hf_kernel_patch.unpatch()
        assert changed(before) == set()
        hf_kernel_patch.patch_transformers(ROPE, models="llama")
    assert changed(before) == {"apply_rotary_pos_emb"}
    hf_kernel_patch.unpatch()


def test_patch_inside_a_block_outlives_it(before: dict[str, Any]) -> None:
    with hf_kernel_patch.patched((NORM, ROPE), models="llama"):
        hf_kernel_patch.patch_transformers((NORM, SWIGLU), models="llama")
    assert changed(before) == {"LlamaRMSNorm.forward", "LlamaMLP.forward"}
    hf_kernel_patch.unpatch()


def test_a_block_over_a_patch_leaves_the_patch(before: dict[str, Any]) -> None:
    hf_kernel_patch.patch_transformers(NORM, models="llama")
    with hf_kernel_patch.patched((NORM, ROPE), models="llama"):
        pass
    assert changed(before) == {"LlamaRMSNorm.forward"}
    hf_kernel_patch.unpatch()


def test_patching_again_puts_the_same_replacement_in_force(before: dict[str, Any]) -> None:
    """torch.compile has nothing to compile again."""
    with hf_kernel_patch.patched(LAYERS, models="llama"):
        first = [llama().LlamaRMSNorm.forward, llama().apply_rotary_pos_emb]
    with hf_kernel_patch.patched(LAYERS, models="llama"):
        assert [llama().LlamaRMSNorm.forward, llama().apply_rotary_pos_emb] == first


def test_all_models_are_patched_by_default(before: dict[str, Any]) -> None:
    for name in ARCHITECTURES:
        modelling(name)
    objects = places()
    with hf_kernel_patch.patched((*LAYERS, MOE), strict=True) as report:
        # Other tests may have imported modules that no table describes.
        listed = [row for row in report if row.architecture in ARCHITECTURES]
        assert {row.architecture for row in listed} == set(ARCHITECTURES)
        patched = {row.site for row in listed if row.outcome == "patched"}
        assert {row.site for row in listed} == patched
        now = places()
        assert {site for site in now if now[site] is not objects[site]} == patched
    assert changed(objects) == set()


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 chooses no experts for decoding")
@pytest.mark.parametrize("first", [0, 1])
def test_classes_that_inherit_one_function_are_patched_and_given_back_one_by_one(
    first: int,
) -> None:
    classes = {
        "qwen3_moe": modelling("qwen3_moe").Qwen3MoeForCausalLM,
        "mixtral": modelling("mixtral").MixtralForCausalLM,
    }
    name = "_optimize_model_for_decode"
    before = {kind: getattr(kind, name) for kind in classes.values()}
    blocks = [hf_kernel_patch.patched("moe", models=model, backend="torch") for model in classes]
    for block in blocks:
        block.__enter__()
    assert all(name in vars(kind) for kind in classes.values())
    blocks[first].__exit__(None, None, None)
    assert [name in vars(kind) for kind in classes.values()] == [first == 1, first == 0]
    blocks[1 - first].__exit__(None, None, None)
    assert all(name not in vars(kind) for kind in classes.values())
    assert all(getattr(kind, name) is value for kind, value in before.items())

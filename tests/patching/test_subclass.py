"""The class that a patched module takes: copies, pickles, files, names, scopes and compilation."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_kernel_patch
from hf_kernel_patch import apply_default_kernels, apply_kernel, unpatch
from tests.support.probes import logits, run_python, served
from tests.support.scope import LAYERS, NORM, ROPE, build, close, kinds, needs_pickle, same, state
from tests.support.tiny import (
    TRANSFORMERS_5,
    largest_error,
    layer_ops_of,
    modelling,
    outputs_and_gradients,
    tiny_model,
    tokens,
)

NAMES = ("llama", "gemma2", "qwen3_moe")


def patched_model(name: str) -> tuple[Any, list[type], torch.Tensor]:
    """A model with all layer kernels on, the classes it had, and the logits it had."""
    model = build(name).eval()
    before, eager = kinds(model), logits(model)
    apply_default_kernels(model, layer_ops_of(name))
    assert kinds(model) != before
    hf_kernel_patch.count_calls()
    return model, before, eager


# -- names


@pytest.mark.parametrize("name", NAMES)
def test_names_types_keys_and_signatures_stay(name: str) -> None:
    model = build(name)
    before, classes = (repr(model), list(model.state_dict())), kinds(model)
    signatures = [inspect.signature(module.forward) for module in model.modules()]
    apply_default_kernels(model, layer_ops_of(name))
    assert (repr(model), list(model.state_dict())) == before
    for module, kind, signature in zip(model.modules(), classes, signatures, strict=True):
        ours = type(module)
        assert isinstance(module, kind)
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(ours, attribute) == getattr(kind, attribute)
        assert inspect.signature(module.forward) == signature
    assert isinstance(model, getattr(modelling(name), type(model).__name__))
    unpatch()


def test_modules_of_one_class_share_one_subclass() -> None:
    model = tiny_model("llama")
    apply_kernel(NORM, model=model)
    norms = {type(module) for module in model.modules() if "Norm" in type(module).__name__}
    assert len(norms) == 1
    unpatch()


# -- copies


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@needs_pickle
@pytest.mark.parametrize("load", [pickled, saved_whole])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_loads_as_the_original_classes(name: str, load: Any) -> None:
    model, before, eager = patched_model(name)
    twin = load(model)
    assert kinds(twin) == before
    calls = served(hf_kernel_patch.status())
    assert torch.equal(logits(twin), eager)
    assert served(hf_kernel_patch.status()) == calls
    unpatch(model)
    assert kinds(model) == before


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_any_protocol_says_nothing_of_this_package(protocol: int) -> None:
    model, before, _ = patched_model("llama")
    stored = pickle.dumps(model.model.norm, protocol)
    assert b"hf_kernel_patch" not in stored
    twin = pickle.loads(stored)
    assert type(twin) in before
    assert torch.equal(twin.weight, model.model.norm.weight)
    unpatch()


@needs_pickle
def test_a_pickle_loads_where_this_package_is_not(tmp_path: Path) -> None:
    model, _, eager = patched_model("llama")
    torch.save({"model": model, "eager": eager, "ids": tokens()}, tmp_path / "model.pt")
    unpatch()
    done = run_python(f"""
import sys
sys.modules["hf_kernel_patch"] = None  # importing it raises
import torch
stored = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
from transformers.models.llama import modeling_llama
model = stored["model"]
assert type(model.model.norm) is modeling_llama.LlamaRMSNorm
with torch.no_grad():
    print(torch.equal(model(stored["ids"]).logits, stored["eager"]))
""")
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_deepcopy_stays_patched_and_is_given_back_by_itself(name: str) -> None:
    model, before, eager = patched_model(name)
    twin = copy.deepcopy(model)
    close(twin, eager)
    assert kinds(twin) == kinds(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    calls = served(hf_kernel_patch.status())
    close(twin, eager)
    assert served(hf_kernel_patch.status()) > calls
    patched = state(model)
    unpatch(twin)
    assert kinds(twin) == before
    assert torch.equal(logits(twin), eager)
    assert same(state(model), patched)
    again = copy.deepcopy(model)
    unpatch(model)
    assert kinds(model) == before
    close(again, eager)
    assert kinds(again) != before
    unpatch()
    assert kinds(again) == before


def test_a_deepcopy_of_a_deepcopy_trains_as_the_original_does() -> None:
    model, _, _ = patched_model("llama")
    expected = outputs_and_gradients(model)
    twin = copy.deepcopy(copy.deepcopy(model))
    assert largest_error(outputs_and_gradients(twin), expected) == 0
    unpatch()


@pytest.mark.parametrize("name", NAMES)
def test_a_shallow_copy_works_and_is_patched(name: str) -> None:
    model, before, eager = patched_model(name)
    twin = copy.copy(model)
    close(twin, eager)
    norm = copy.copy(model.model.norm)
    assert type(norm) is type(model.model.norm)
    assert norm.weight is model.model.norm.weight
    norm.extra = 1
    assert not hasattr(model.model.norm, "extra")
    unpatch(model)
    assert kinds(twin)[1:] == before[1:]  # the copy has the model's parts, but a class of its own
    unpatch()
    assert kinds(twin) == before
    assert type(norm) is before[-2] or type(norm).__mro__[1] is torch.nn.Module


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    plain = build(name)
    plain.save_pretrained(tmp_path / "plain")
    model, before, eager = patched_model(name)
    model.save_pretrained(tmp_path / "patched")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "patched" / file.name).read_bytes() == file.read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
    assert kinds(loaded) == before
    assert torch.equal(logits(loaded), eager)
    model.load_state_dict(loaded.state_dict(), strict=True)
    unpatch()


# -- the function of the module's globals


@pytest.mark.parametrize("name", NAMES)
def test_rope_is_served_in_the_model_s_own_forward_over_the_module_s_globals(name: str) -> None:
    model = tiny_model(name)
    module = modelling(name)
    before, loaded = dict(vars(module)), set(sys.modules)
    apply_kernel(ROPE, model=model)
    forward = inspect.unwrap(type(model.model.layers[0].self_attn).forward)
    assert forward.__globals__ is vars(module)
    assert "rope(self, apply_rotary_pos_emb)(" in inspect.getsource(forward.__code__)
    assert vars(module).keys() == before.keys()
    assert all(vars(module)[key] is before[key] for key in before)
    assert set(sys.modules) == loaded
    unpatch()


def test_two_models_share_what_is_asked_of_both() -> None:
    models = [apply_kernel(ROPE, model=tiny_model("llama")) for _ in range(2)]
    kinds = {type(m.model.layers[0].self_attn) for m in models}
    assert len(kinds) == 1
    unpatch(models[0])
    assert type(models[0].model.layers[0].self_attn) not in kinds
    assert {type(models[1].model.layers[0].self_attn)} == kinds
    unpatch()


def test_a_function_that_attention_calls_may_be_replaced_while_one_model_is_patched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama", attn_implementation="eager").eval()
    calls: list[int] = []
    original = modelling("llama").eager_attention_forward

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*arguments, **options)

    apply_kernel(ROPE, model=model)
    monkeypatch.setattr(modelling("llama"), "eager_attention_forward", counted)
    logits(model)
    monkeypatch.undo()
    logits(model)
    assert len(calls) == 2
    unpatch()


@pytest.mark.skipif(TRANSFORMERS_5, reason="5 has no decorator of this kind on attention")
def test_the_wrappers_of_a_forward_are_copied_with_it() -> None:
    model = tiny_model("llama")
    original = type(model.model.layers[0].self_attn).forward
    apply_kernel(ROPE, model=model)
    ours = type(model.model.layers[0].self_attn).forward
    assert ours.__code__ is original.__code__
    assert ours.__wrapped__ is not original.__wrapped__
    unpatch()


def helper(x: int) -> int:
    return x + 1


def caller(x: int, *, times: int = 2) -> int:
    """Text."""
    return helper(x) * times


# -- torch.compile


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_a_patched_model_compiles_as_one_graph() -> None:
    model = tiny_model("llama", num_hidden_layers=1).eval()
    eager = logits(model)
    apply_default_kernels(model, LAYERS)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled, eager)
    unpatch(model)
    close(compiled, eager)
    torch.compiler.reset()

"""The class that a patched module takes: copies, pickles, files, names, scopes and compilation."""

from __future__ import annotations

import copy
import functools
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
from hf_kernel_patch.patching.subclass import rebound
from tests.probes import logits, run_python, served
from tests.scope import LAYERS, NORM, ROPE, build, close, kinds, needs_pickle, same, state
from tests.tiny import (
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
def test_rope_is_rebound_in_a_scope_of_the_model_alone(name: str) -> None:
    model = tiny_model(name)
    module = modelling(name)
    before = dict(vars(module))
    apply_kernel(ROPE, model=model)
    attention = model.model.layers[0].self_attn
    scope = inspect.unwrap(type(attention).forward).__globals__
    assert scope is not vars(module)
    assert scope["apply_rotary_pos_emb"] is not module.apply_rotary_pos_emb
    assert sys.modules[scope["__name__"]].__dict__ is scope
    assert vars(module).keys() == before.keys()
    assert all(vars(module)[key] is before[key] for key in before)
    ours = {key for key in before if key in scope and scope[key] is not before[key]}
    assert ours - {"__name__", "__spec__", "__loader__"} == {"apply_rotary_pos_emb"}
    unpatch()


def test_two_models_have_a_scope_each() -> None:
    models = [apply_kernel(ROPE, model=tiny_model("llama")) for _ in range(2)]
    forwards = [inspect.unwrap(type(m.model.layers[0].self_attn).forward) for m in models]
    assert forwards[0].__globals__ is not forwards[1].__globals__
    assert forwards[0].__code__ is forwards[1].__code__
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


def test_a_rebound_copy_is_the_function_but_for_one_global() -> None:
    before = set(sys.modules)
    made = rebound(caller, "helper", lambda x: x + 100)
    try:
        assert (made(1), made(1, times=3), caller(1)) == (202, 303, 4)
        assert inspect.signature(made) == inspect.signature(caller)
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(made, attribute) == getattr(caller, attribute)
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


def test_a_wrapper_that_cannot_be_copied_is_said() -> None:
    def hiding(function: Any) -> Any:
        held = [function]

        @functools.wraps(function)
        def wrapper(x: int) -> int:
            return held[0](x)

        return wrapper

    before = set(sys.modules)
    reason = rebound(hiding(caller), "helper", helper)
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert isinstance(reason, str)
    assert "caller is wrapped in a way that cannot be copied" in reason


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

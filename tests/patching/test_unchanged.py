"""What patching does not touch: keys, names, types, copies, files and generated text."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_kernel_patch
from tests.support.probes import LAYERS, changed, logits, places, served
from tests.support.tiny import ARCHITECTURES, layer_ops_of, modelling, tiny_model, tokens

NAMES = ("llama", "gemma2", "qwen3_moe")
#: Whether ``kernels`` has made a module of the rotary function.
BY_KERNELS = isinstance(modelling("llama").apply_rotary_pos_emb, torch.nn.Module)
Inside = Callable[[str], AbstractContextManager[Any]]


def inside(name: str) -> AbstractContextManager[Any]:
    """All layer kernels on one architecture."""
    return hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True)


def outside(name: str) -> AbstractContextManager[Any]:
    """Nothing patched."""
    return nullcontext()


@pytest.fixture(autouse=True)
def places_as_before() -> Iterator[None]:
    for name in NAMES:
        modelling(name)
    before = places()
    yield
    assert changed(before) == set()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keys_names_and_types_of_a_model(name: str) -> None:
    model = tiny_model(name)

    def seen(model: Any) -> tuple[Any, ...]:
        return (
            [(key, value.data_ptr()) for key, value in model.state_dict().items()],
            repr(model),
            [(name, type(module)) for name, module in model.named_modules()],
            [(name, id(parameter)) for name, parameter in model.named_parameters()],
            [(name, sorted(vars(module))) for name, module in model.named_modules()],
        )

    before = seen(model)
    with inside(name):
        assert seen(model) == before
        assert isinstance(model, PreTrainedModel)
        fresh = tiny_model(name)
        assert list(fresh.state_dict()) == list(model.state_dict())
        assert repr(fresh) == before[1]
        assert [type(module) for module in fresh.modules()] == [kind for _, kind in before[2]]
        logits(model)
    assert seen(model) == before


def holds_the_rotary_function(model: Any) -> bool:
    """transformers 5.0 to 5.14 keep the function, never called, on every attention module."""
    return "rotary_fn" in vars(model.model.layers[0].self_attn)


def copies(model: Any, folder: Path) -> dict[str, Any]:
    """The model copied in every way that works for it."""
    model.save_pretrained(folder / "saved")
    torch.save(model.state_dict(), folder / "state.pt")
    state = torch.load(folder / "state.pt", weights_only=True)
    fresh = tiny_model(model.config.model_type)
    fresh.load_state_dict(state, strict=True)
    made = {
        "deepcopy": copy.deepcopy(model),
        "copy": copy.copy(model),
        "saved": AutoModelForCausalLM.from_pretrained(folder / "saved"),
        "state": fresh,
    }
    if not (BY_KERNELS or holds_the_rotary_function(model)):
        made["pickle"] = pickle.loads(pickle.dumps(model))
    return made


@pytest.mark.parametrize(("made_in", "used_in"), [(inside, outside), (outside, inside)])
@pytest.mark.parametrize("name", NAMES)
def test_copies_of_every_kind(name: str, made_in: Inside, used_in: Inside, tmp_path: Path) -> None:
    model = tiny_model(name).eval()
    eager, kinds = logits(model), [type(module) for module in model.modules()]
    hf_kernel_patch.count_calls()
    with made_in(name) as report:
        made = copies(model, tmp_path)
        for twin in made.values():
            torch.testing.assert_close(logits(twin.eval()), eager, rtol=1e-5, atol=1e-6)
        calls = served(report) if report else 0
    with used_in(name) as later:
        for twin in made.values():
            assert [type(module) for module in twin.modules()] == kinds
            assert list(twin.state_dict()) == list(model.state_dict())
            torch.testing.assert_close(logits(twin), eager, rtol=1e-5, atol=1e-6)
        assert bool(calls) != bool(later and served(later))
        assert calls == (served(report) if report else 0)


@pytest.mark.skipif(BY_KERNELS, reason="with `kernels` a model cannot be pickled at all")
@pytest.mark.parametrize("built_in", [outside, inside])
def test_pickles_made_before_inside_and_after(
    built_in: Inside, request: pytest.FixtureRequest
) -> None:
    with built_in("llama"):
        model = tiny_model("llama").eval()
    eager, before = logits(model), pickle.dumps(model)
    if holds_the_rotary_function(model):
        reason = "pickle finds another function under the name of the one that attention keeps"
        request.applymarker(
            pytest.mark.xfail(raises=pickle.PicklingError, reason=reason, strict=True)
        )
    with inside("llama"):
        within = pickle.dumps(model)
        torch.testing.assert_close(logits(pickle.loads(before)), eager, rtol=1e-5, atol=1e-6)
    for stored in (within, pickle.dumps(model)):
        assert b"hf_kernel_patch" not in stored
        assert torch.equal(logits(pickle.loads(stored)), eager)


def test_files_saved_inside_are_the_files_saved_outside(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "outside")
    with inside("llama"):
        model.save_pretrained(tmp_path / "inside")
    for file in sorted((tmp_path / "outside").iterdir()):
        assert (tmp_path / "inside" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_loaded_inside_is_served_and_stays_when_it_is_unpatched(
    name: str, tmp_path: Path
) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    hf_kernel_patch.count_calls()
    with inside(name) as report:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        within = logits(model)
        calls = served(report)
        assert calls >= 5
    torch.testing.assert_close(logits(model), within, rtol=1e-5, atol=1e-6)
    assert served(report) == calls


@pytest.mark.parametrize("name", NAMES)
def test_generated_tokens(name: str) -> None:
    model = tiny_model(name).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ids = tokens(length=5)
    eager = model.generate(ids, **options)
    with inside(name):
        assert torch.equal(model.generate(ids, **options), eager)
    assert torch.equal(model.generate(ids, **options), eager)


def test_a_class_derived_while_patched_is_an_ordinary_class() -> None:
    llama = modelling("llama")
    with hf_kernel_patch.patched(LAYERS, models="llama"):
        own = type("Own", (llama.LlamaMLP,), {"__module__": __name__})
        assert "forward" not in vars(own)
    assert own.forward is llama.LlamaMLP.forward

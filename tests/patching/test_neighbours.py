"""Beside others that change models, and with code that comes from elsewhere than a file."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_kernel_patch
from hf_kernel_patch import ForeignPatchError, KernelPatchWarning
from tests.support.probes import changed, llama, places, run_python, served
from tests.support.scope import same, shared, state, unchanged
from tests.support.tiny import (
    largest_error,
    layer_ops_of,
    ops_of,
    outputs_and_gradients,
    tiny_config,
    tiny_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::hf_kernel_patch.KernelPatchWarning")
OPS = layer_ops_of("llama")


@pytest.fixture(autouse=True)
def llama_as_it_was() -> Iterator[None]:
    """What a neighbour leaves in Llama's module and classes is put right again."""
    module = llama()
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    owners = [module, *(kind for kind in classes if kind.__module__ == module.__name__)]
    before = [(owner, dict(vars(owner))) for owner in owners]
    hf_kernel_patch.count_calls()
    yield
    for owner, members in before:
        for name, value in members.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)


def reasons(report: Any) -> dict[str, str]:
    """Op -> why it is not in force, or not everywhere."""
    return {row.op: row.reason for row in report if row.outcome in ("skipped", "shadowed")}


# -- Liger


@pytest.fixture
def liger() -> Any:
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("needs the package liger-kernel")
    return importlib.import_module("liger_kernel.transformers")


def test_liger_s_global_patch_under_ours_is_named_and_stays(liger: Any) -> None:
    liger.apply_liger_kernel_to_llama()
    before = shared("llama")
    with hf_kernel_patch.patched(ops_of("llama"), models="llama") as report:
        why = reasons(report)
        assert [row.op for row in report.patched] == ["add_rms_norm"]
    assert why.keys() == {"rms_norm", "rope", "swiglu", "linear_cross_entropy"}
    assert all("liger_kernel" in reason for reason in why.values())
    assert unchanged("llama", before)


def test_liger_s_global_patch_over_ours_is_named_and_stays(liger: Any) -> None:
    objects = places()
    hf_kernel_patch.patch_transformers(ops_of("llama"), models="llama", strict=True)
    norm, mlp = llama().LlamaRMSNorm, llama().LlamaMLP
    liger.apply_liger_kernel_to_llama()
    with pytest.raises(ForeignPatchError, match="liger_kernel") as raised:
        hf_kernel_patch.unpatch()
    for name in ("apply_rotary_pos_emb", "LlamaForCausalLM.forward"):
        assert name in str(raised.value)
    assert llama().apply_rotary_pos_emb is liger.rope.liger_rotary_pos_emb
    # It has put classes of its own in the place of these, which are as they were.
    llama().LlamaRMSNorm, llama().LlamaMLP = norm, mlp
    assert changed(objects) == {"apply_rotary_pos_emb", "LlamaForCausalLM.forward"}


def test_the_trainer_s_use_liger_kernel_on_one_model(liger: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    arguments = TrainingArguments(str(tmp_path), use_liger_kernel=True, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments)
    if "forward" not in vars(model.model.norm):  # transformers 5 does it when training begins
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(trainer.model, arguments.liger_kernel_config)
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    assert "liger_kernel" in vars(norm)["forward"].__func__.__module__
    before, module = state(model), shared("llama")
    # The classes that it has put into the module are none that this model has.
    with pytest.warns(KernelPatchWarning, match="torch_fused_rmsnorm found no site in this Llama"):
        hf_kernel_patch.apply_default_kernels(model, ops_of("llama"))
    why = reasons(hf_kernel_patch.status())
    assert why.keys() == {"rope", "linear_cross_entropy"}
    assert all("liger_kernel" in reason for reason in why.values())
    assert "liger_kernel" in vars(mlp)["forward"].__func__.__module__
    hf_kernel_patch.unpatch(model)
    assert same(state(model), before)
    assert unchanged("llama", module)


# -- the package kernels


@pytest.fixture
def kernels() -> Any:
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        pytest.skip("needs the package kernels in a version that this transformers takes")
    return importlib.import_module("kernels")


@pytest.mark.versions
@pytest.mark.parametrize("scope", ["all models", "one model"])
def test_use_kernels_in_from_pretrained(
    kernels: Any, scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, use_kernels=True)
    assert model.use_kernels
    model.train()
    eager, before, objects = outputs_and_gradients(model), state(model), places()
    if scope == "one model":
        hf_kernel_patch.apply_default_kernels(model, OPS)
    else:
        hf_kernel_patch.patch_transformers(OPS, models="llama", strict=True)
    assert largest_error(outputs_and_gradients(model), eager) < 3e-6
    assert {row.op for row in hf_kernel_patch.status() if row.served} >= {"swiglu", "add_rms_norm"}
    hf_kernel_patch.unpatch()
    assert same(state(model), before)
    assert changed(objects) == set()


class Doubled(nn.Module):
    """What a kernel from the hub is: a class of which ``kernelize`` takes the forward."""

    has_backward = can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2 * self.weight


class Repository:
    """One that has been loaded."""

    layer_name = "RMSNorm"

    def load(self) -> type[nn.Module]:
        return Doubled


def kernelized(kernels: Any, model: Any) -> None:
    mapping = {"RMSNorm": {"cpu": Repository()}}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    assert vars(model.model.norm)["forward"].__func__ is Doubled.forward


@pytest.mark.versions
def test_kernelize_under_ours_is_named_and_stays(kernels: Any) -> None:
    model, objects = tiny_model("llama"), places()
    kernelized(kernels, model)
    eager, before = outputs_and_gradients(model), state(model)
    with hf_kernel_patch.patched(OPS, models="llama") as report:
        assert "Doubled.forward of tests.patching.test_neighbours" in reasons(report)["rms_norm"]
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
    assert same(state(model), before)
    assert changed(objects) == set()


@pytest.mark.versions
def test_kernelize_over_ours_stays(kernels: Any) -> None:
    model, twin, objects = tiny_model("llama"), tiny_model("llama"), places()
    kernelized(kernels, twin)
    eager = outputs_and_gradients(twin)
    with hf_kernel_patch.patched(OPS, models="llama"):
        kernelized(kernels, model)
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
    assert vars(model.model.norm)["forward"].__func__ is Doubled.forward
    assert largest_error(outputs_and_gradients(model), eager) == 0
    assert changed(objects) == set()


# -- transformers.monkey_patching


class Other(nn.Module):
    """A norm of somebody's own."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


@pytest.fixture
def patching() -> Iterator[Any]:
    """transformers' own patching, with ``Other`` for Llama's norm."""
    module = pytest.importorskip("transformers.monkey_patching", reason="needs transformers 5.3")
    module.register_patch_mapping({"LlamaRMSNorm": Other})
    yield module
    module.clear_patch_mapping()


def test_a_class_that_transformers_replaced_before_our_patch(patching: Any) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert type(model.model.norm) is Other
    eager, before, objects = outputs_and_gradients(model), state(model), places()
    for scope in ("all models", "one model"):
        if scope == "one model":
            hf_kernel_patch.apply_default_kernels(model, OPS)
        else:
            hf_kernel_patch.patch_transformers(OPS, models="llama", strict=True)
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
        rows = {row.op: row for row in hf_kernel_patch.status()}
        assert rows["swiglu"].served and rows["rope"].served
        assert "rms_norm" not in rows or not rows["rms_norm"].served
        assert rows["add_rms_norm"].fallbacks == {"Other is not a norm of a known leaf": 2}
        hf_kernel_patch.unpatch()
        assert same(state(model), before)
        assert changed(objects) == set()


def test_a_class_that_transformers_replaces_after_our_patch(patching: Any) -> None:
    objects = places()
    torch.manual_seed(0)
    eager = outputs_and_gradients(AutoModelForCausalLM.from_config(tiny_config("llama")))
    with hf_kernel_patch.patched(OPS, models="llama", strict=True) as report:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        assert type(model.model.norm) is Other
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
        assert served(report)
    assert largest_error(outputs_and_gradients(model), eager) == 0
    assert changed(objects) == set()


def test_our_patch_inside_of_apply_patches(patching: Any) -> None:
    """The class that stands there then is named; the one that comes back is as it was."""
    objects = places()
    with patching.apply_patches():
        report = hf_kernel_patch.patch_transformers(OPS, models="llama")
        assert __name__ in reasons(report)["rms_norm"]
    with patching.apply_patches():
        hf_kernel_patch.unpatch()
    assert changed(objects) == set()


# -- threads


FIRST = """
import sys, threading
import hf_kernel_patch
from hf_kernel_patch import models, registry

sys.setswitchinterval(1e-5)
barrier, seen = threading.Barrier(8), set()


def look():
    barrier.wait()
    seen.add((len(registry.kernels()), len(models.architectures())))


threads = [threading.Thread(target=look) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(seen))
"""


def test_whoever_is_first_sees_all_kernels_and_tables() -> None:
    ran = run_python(FIRST)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "1"


def test_two_threads_patch_while_a_third_trains() -> None:
    """One for all models, one the very model that is running."""
    model = tiny_model("qwen3").train()
    objects, before, truth = places(), state(model), outputs_and_gradients(model)
    assert hf_kernel_patch.get_available_kernels()  # see the test above
    done, errors, steps = threading.Event(), [], []

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    def for_all_models() -> None:
        for _ in range(6):
            for ops in ("rms_norm,add_rms_norm", "qk_norm_rope,linear_cross_entropy,rope"):
                with hf_kernel_patch.patched(ops, models="qwen3", strict=True):
                    pause()

    def for_this_model() -> None:
        for _ in range(6):
            for ops in ("swiglu,qk_norm_rope", "add_rms_norm,rms_norm,linear_cross_entropy"):
                hf_kernel_patch.apply_default_kernels(model, ops)
                pause()
                hf_kernel_patch.unpatch(model)

    def pause() -> None:
        """Until the third has made a step or two."""
        count = len(steps)
        while len(steps) < count + 2 and not errors:
            done.wait(0.002)

    def train() -> None:
        while not done.is_set():
            steps.append(largest_error(outputs_and_gradients(model), truth))

    others = [guarded(for_all_models), guarded(for_this_model)]
    runner = guarded(train)
    for thread in (runner, *others):
        thread.start()
    for thread in others:
        thread.join(120)
    done.set()
    runner.join(120)
    assert not errors
    assert len(steps) > 20 and max(steps) < 1e-5
    assert max(steps) > 0  # some of them were served
    assert changed(objects) == set()
    assert same(state(model), before)
    assert largest_error(outputs_and_gradients(model), truth) == 0

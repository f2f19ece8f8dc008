"""``status()`` says what is true when it is asked, and an equal patch mends what can be mended."""

from __future__ import annotations

import functools
import gc
import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_kernel_patch
from hf_kernel_patch import KernelPatchCallback, KernelPatchWarning, registry
from hf_kernel_patch.kernels import register_kernel
from hf_kernel_patch.models import Architecture, architectures, register_model
from tests.support.dataset import Rows
from tests.support.probes import LAYERS, ROPE, SWIGLU, llama, logits, served
from tests.support.tiny import modelling, tiny_config, tiny_model, tokens

NAME = "smollm3"


def row(site: str) -> Any:
    """The one row of a site in the status of now."""
    (found,) = [one for one in hf_kernel_patch.status() if one.site.endswith(site)]
    return found


def is_ours(value: Any) -> bool:
    return hasattr(value, "__hf_kernel_patch__")


@pytest.fixture
def smollm3() -> Iterator[Any]:
    """A modelling module of its own, which the test may load again."""
    module = modelling(NAME)
    package, before = sys.modules[module.__package__], dict(vars(module))
    yield module
    hf_kernel_patch.unpatch()
    vars(module).update(before)
    sys.modules[module.__name__] = package.modeling_smollm3 = module


@pytest.mark.parametrize("alone", [False, True])
def test_a_forward_that_is_set_on_an_instance_later_is_told(alone: bool) -> None:
    model = tiny_model("llama")
    if alone:
        hf_kernel_patch.apply_kernel(SWIGLU, model=model)
    else:
        hf_kernel_patch.patch_transformers(SWIGLU, models="llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: x
    assert row("LlamaMLP.forward").outcome == "shadowed"
    assert "own a forward" in row("LlamaMLP.forward").reason.replace("owns", "own")
    del mlp.forward
    assert (row("LlamaMLP.forward").outcome, row("LlamaMLP.forward").reason) == ("patched", "")
    hf_kernel_patch.unpatch()


def test_a_class_that_is_patched_later_is_told() -> None:
    hf_kernel_patch.patch_transformers(SWIGLU, models="llama")
    ours = llama().LlamaMLP.forward

    def foreign(self: Any, x: torch.Tensor) -> Any:
        return ours(self, x)

    llama().LlamaMLP.forward = foreign
    for _ in range(2):
        found = row("LlamaMLP.forward")
        assert found.outcome == "shadowed"
        assert "LlamaMLP.forward was patched over by" in found.reason
        assert "foreign of tests.patching.test_status" in found.reason
        hf_kernel_patch.patch_transformers(SWIGLU, models="llama")  # an equal one, no new patch
        assert llama().LlamaMLP.forward is foreign
    llama().LlamaMLP.forward = ours
    assert row("LlamaMLP.forward").outcome == "patched"
    hf_kernel_patch.unpatch()


def test_a_class_that_is_patched_after_one_model_is_told_not_to_reach_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama").eval()
    before = logits(model)
    hf_kernel_patch.apply_kernel(SWIGLU, model=model)
    with monkeypatch.context() as for_a_while:
        for_a_while.setattr(llama().LlamaMLP, "forward", lambda self, x: x)
        assert "was patched later by" in row("LlamaMLP.forward").reason
    assert row("LlamaMLP.forward").reason == ""
    monkeypatch.setattr(llama().LlamaMLP, "forward", lambda self, x: x)
    assert "was patched later by" in row("LlamaMLP.forward").reason
    assert "does not reach this model" in row("LlamaMLP.forward").reason
    hf_kernel_patch.apply_kernel("torch_fused_rmsnorm", model=model)
    hf_kernel_patch.patch_transformers("rms_norm", models="llama", backend="torch")
    torch.testing.assert_close(logits(model), before)
    hf_kernel_patch.unpatch()
    assert not torch.equal(logits(model), before)  # somebody's forward is in force again
    monkeypatch.undo()
    torch.testing.assert_close(logits(model), before)


def loaded_again(module: Any) -> Any:
    return importlib.reload(module)


def imported_anew(module: Any) -> Any:
    del sys.modules[module.__name__]
    return importlib.import_module(module.__name__)


@pytest.mark.parametrize("again", [loaded_again, imported_anew])
def test_a_module_that_is_loaded_anew_is_patched_anew(
    again: Callable[[Any], Any], smollm3: Any
) -> None:
    model = smollm3.SmolLM3ForCausalLM(tiny_config(NAME)).eval()
    before = logits(model)
    hf_kernel_patch.count_calls()
    hf_kernel_patch.patch_transformers(LAYERS, models=NAME)
    old = {name: smollm3.__dict__[name] for name in ("SmolLM3MLP", "SmolLM3RMSNorm")}
    new = again(smollm3)
    assert new.SmolLM3MLP is not old["SmolLM3MLP"]
    assert {one.outcome for one in hf_kernel_patch.status()} == {"patched"}
    for kind in (*old.values(), new.SmolLM3MLP, new.SmolLM3RMSNorm):
        assert is_ours(kind.forward)
    assert is_ours(new.apply_rotary_pos_emb)
    torch.testing.assert_close(logits(model), before)
    calls = served(hf_kernel_patch.status())
    made = new.SmolLM3ForCausalLM(tiny_config(NAME)).eval()
    made.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(made), before)
    assert served(hf_kernel_patch.status()) == 2 * calls > 0
    hf_kernel_patch.unpatch()
    for kind in (*old.values(), new.SmolLM3MLP, new.SmolLM3RMSNorm):
        assert not is_ours(kind.forward)
    assert not is_ours(new.apply_rotary_pos_emb)
    torch.testing.assert_close(logits(made), before)


def test_a_module_that_ran_again_unnoticed_is_told_and_patched_by_an_equal_call(
    smollm3: Any,
) -> None:
    hf_kernel_patch.patch_transformers(LAYERS, models=NAME)
    file = Path(smollm3.__file__)
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), vars(smollm3))
    assert not is_ours(smollm3.SmolLM3MLP.forward)
    for one in hf_kernel_patch.status():
        assert one.outcome == "shadowed", one
        assert "loaded anew and is not patched: call patch_transformers() again" in one.reason
    report = hf_kernel_patch.patch_transformers(LAYERS, models=NAME)
    assert {one.outcome for one in report} == {"patched"}
    assert is_ours(smollm3.SmolLM3MLP.forward) and is_ours(smollm3.apply_rotary_pos_emb)
    hf_kernel_patch.unpatch()
    assert not is_ours(smollm3.SmolLM3MLP.forward) and not is_ours(smollm3.apply_rotary_pos_emb)


def test_unpatch_does_not_blame_a_module_for_its_own_code(smollm3: Any) -> None:
    hf_kernel_patch.patch_transformers(LAYERS, models=NAME)
    file = Path(smollm3.__file__)
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), vars(smollm3))
    own = smollm3.apply_rotary_pos_emb
    hf_kernel_patch.unpatch()
    assert smollm3.apply_rotary_pos_emb is own


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with Llama's MLP that waits half way, and a table for it."""
    source = Path(llama().__file__).read_text(encoding="utf-8")
    source = source.replace("from ...", "from transformers.")
    source = source.replace("from .conf", "from transformers.models.llama.conf")
    source = source.replace(
        "class LlamaMLP(", "import slow_gate; slow_gate.wait()\nclass LlamaMLP("
    )
    (tmp_path / "slow_llama.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    register_model(Architecture("slow", {"LlamaMLP.forward": "gated_product"}, module="slow_llama"))
    yield "slow_llama"
    del architectures()["slow"]
    sys.modules.pop("slow_llama", None)
    sys.modules.pop("slow_gate", None)


def test_a_module_that_another_thread_is_importing_is_waited_for(slow_module: str) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(60)

    gate = types.ModuleType("slow_gate")
    gate.wait = wait  # type: ignore[attr-defined]
    sys.modules["slow_gate"] = gate
    importing = threading.Thread(target=importlib.import_module, args=(slow_module,))
    importing.start()
    assert inside.wait(60)
    timer = threading.Timer(0.3, go_on.set)
    timer.start()
    report = hf_kernel_patch.patch_transformers(SWIGLU, models="slow", strict=True)
    importing.join(60)
    assert [one.outcome for one in report] == ["patched"]
    assert is_ours(sys.modules[slow_module].LlamaMLP.forward)
    hf_kernel_patch.unpatch()
    assert not is_ours(sys.modules[slow_module].LlamaMLP.forward)


def test_a_module_that_patches_while_it_is_imported_is_patched_when_that_has_ended(
    slow_module: str,
) -> None:
    gate = types.ModuleType("slow_gate")
    gate.wait = lambda: hf_kernel_patch.patch_transformers(SWIGLU, models="slow")  # type: ignore[attr-defined]
    sys.modules["slow_gate"] = gate
    module: Any = importlib.import_module(slow_module)
    assert row("LlamaMLP.forward").outcome == "pending"
    assert "call patch_transformers() again" in row("LlamaMLP.forward").reason
    hf_kernel_patch.patch_transformers(SWIGLU, models="slow")
    assert row("LlamaMLP.forward").outcome == "patched" and is_ours(module.LlamaMLP.forward)
    hf_kernel_patch.unpatch()


@pytest.fixture
def other_rope() -> Iterator[str]:
    """Another kernel of the op, which makes a patch a different one."""
    own = type("OtherRope", (registry.kernels()[ROPE],), {"kernel_id": "other_rope"})
    register_kernel(own)
    yield "other_rope"
    del registry.kernels()["other_rope"]


def test_an_importer_that_kept_a_replacement_is_reached_by_a_different_patch(
    other_rope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_kernel_patch.patch_transformers(ROPE, models="llama")
    importer = types.ModuleType("importer")
    kept = importer.rotate = llama().apply_rotary_pos_emb  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "importer", importer)
    hf_kernel_patch.unpatch()
    assert importer.rotate is kept
    hf_kernel_patch.patch_transformers(other_rope, models="llama")
    assert importer.rotate is llama().apply_rotary_pos_emb is not kept
    assert (row("apply_rotary_pos_emb").outcome, row("apply_rotary_pos_emb").reason) == (
        "patched",
        "",
    )
    hf_kernel_patch.unpatch()
    assert importer.rotate is kept


def test_a_patch_that_cannot_reach_who_kept_a_replacement_says_so(other_rope: str) -> None:
    hf_kernel_patch.count_calls()
    hf_kernel_patch.patch_transformers(ROPE, models="llama")

    class Kept:
        rotate = staticmethod(llama().apply_rotary_pos_emb)

    hf_kernel_patch.unpatch()
    with pytest.warns(KernelPatchWarning, match="holds a function of an earlier patch"):
        hf_kernel_patch.patch_transformers(other_rope, models="llama")
    q, k = torch.randn(2, 1, 2, 3, 4)
    cos, sin = torch.randn(2, 1, 3, 4)
    expected = llama().apply_rotary_pos_emb.__wrapped__(q, k, cos, sin)
    torch.testing.assert_close(Kept.rotate(q, k, cos, sin), expected)
    assert served(hf_kernel_patch.status()) == 0
    assert "runs the original" in row("apply_rotary_pos_emb").reason
    hf_kernel_patch.unpatch()
    del Kept
    gc.collect()


def leave_a_cycle(value: Any) -> None:
    """A closure that holds a value, and itself, so that it is not freed at once."""

    def held() -> Any:
        return value, held


def test_a_holder_that_is_only_not_collected_yet_is_no_reason_to_complain(other_rope: str) -> None:
    hf_kernel_patch.patch_transformers(ROPE, models="llama")
    gc.disable()
    try:
        leave_a_cycle(llama().apply_rotary_pos_emb)
        hf_kernel_patch.unpatch()
        hf_kernel_patch.patch_transformers(other_rope, models="llama", strict=True)
    finally:
        gc.enable()
    hf_kernel_patch.unpatch()


class FrontTrainer(Trainer):
    """Sets a forward of its own after its construction, as TRL's trainers do."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        model: Any = self.model
        before = model.forward

        @functools.wraps(type(model).forward)
        def forward(*given: Any, **named: Any) -> Any:
            return before(*given, **named)

        model.forward = forward


def test_the_callback_warns_of_a_forward_that_a_trainer_puts_in_front(tmp_path: Path) -> None:
    callback = KernelPatchCallback(
        "linear_cross_entropy", options={"linear_cross_entropy": {"z_loss": 1e-3}}
    )
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    model = tiny_model("llama")
    trainer = FrontTrainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
    found = row("LlamaForCausalLM.forward")
    assert found.outcome == "shadowed" and "of tests.patching.test_status" in found.reason
    with pytest.warns(KernelPatchWarning, match=r"LlamaForCausalLM\.forward is not served") as told:
        trainer.train()
    assert len([one for one in told if one.category is KernelPatchWarning]) == 1
    del trainer
    hf_kernel_patch.unpatch()
    assert model(input_ids=tokens(), labels=tokens()).loss.requires_grad

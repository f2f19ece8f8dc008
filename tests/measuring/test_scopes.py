"""Several patches, models and threads; what ends in the middle, and what is found again."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch.measuring import optimizers
from hf_kernel_patch.patching import model_patch
from tests.measuring.worlds import (
    Clock,
    Training,
    hooks_left,
    is_chosen,
    kernels,
    measured,
    steps_until_chosen,
)
from tests.support.probes import served
from tests.support.tiny import tiny_model, tokens

OTHERS = "swiglu,add_rms_norm,linear_cross_entropy,moe,qk_norm_rope"
ONLY: dict[str, Any] = {"models": "llama", "exclude": OTHERS}


def costs(clock: Clock) -> Any:
    return kernels(clock, rms_norm=0.1, rope=-0.1)


def test_one_model_alone(clock: Clock) -> None:
    training, other = (Training(tiny_model("llama"), clock) for _ in range(2))
    with costs(clock):
        hf_kernel_patch.apply_default_kernels(training.model, "measured", exclude=OTHERS)
        report = hf_kernel_patch.status()
        steps_until_chosen(training.step, report)
        assert "left out, 62.5% slower" in measured(report)["rms_norm"]
        assert "20.0% faster" in measured(report)["rope"]
        begun = clock.now
        training.step()
        assert clock.now == pytest.approx(begun + 1 - 2 * 0.1)
        begun = clock.now
        other.step()
        assert clock.now == begun + 1
        hf_kernel_patch.unpatch(training.model)
        assert not hooks_left()


def test_two_models_alone(clock: Clock) -> None:
    """They share the functions that serve them, and each has a choice of its own."""
    first = Training(tiny_model("llama"), clock)
    second = Training(tiny_model("llama", num_hidden_layers=1), clock)
    with costs(clock):
        for one in (first, second):
            hf_kernel_patch.apply_default_kernels(one.model, "measured", exclude=OTHERS)

        def both() -> None:
            first.step()
            second.step()

        steps_until_chosen(both, hf_kernel_patch.status())
        rows = [row for row in hf_kernel_patch.status() if row.op == "rms_norm"]
        assert len({row.measured for row in rows}) == 2
        assert all(row.measured.count("left out") == 1 for row in rows)
        hf_kernel_patch.unpatch(first.model)
        assert hooks_left() == 1  # the other one's
        begun = clock.now
        second.step()
        assert clock.now == pytest.approx(begun + 1 - 0.1)
        hf_kernel_patch.unpatch()


def test_a_second_run_measures_nothing(clock: Clock, folder: Path) -> None:
    with costs(clock):
        with hf_kernel_patch.patched("measured", **ONLY) as report:
            steps_until_chosen(Training(tiny_model("llama"), clock).step, report)
        (file,) = folder.iterdir()
        before = file.read_bytes()
        with hf_kernel_patch.patched("measured", **ONLY) as report:
            training = Training(tiny_model("llama"), clock)
            begun = clock.now
            training.step()
            assert clock.now == pytest.approx(begun + 1 - 2 * 0.1)
            assert (
                f"left out, 62.5% slower with it (LlamaForCausalLM, cpu, training; from {file})"
                in (measured(report)["rms_norm"])
            )
            assert not hooks_left()
        assert file.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"intermediate_size": 128},
        {"num_hidden_layers": 1},
        {"dtype": torch.bfloat16},
        {"checkpointing": True},
        {"frozen": True},
        {"ids": tokens(8, 60)},
        {"exclude": "rope"},
        {"options": "rms_norm.none=1"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_choice_depends_on(clock: Clock, folder: Path, change: dict[str, Any]) -> None:
    with hf_kernel_patch.patched("measured", models="llama") as report:
        steps_until_chosen(Training(tiny_model("llama"), clock).step, report)
    given = dict(change)
    asked = {name: given.pop(name) for name in ("exclude", "options") if name in given}
    if "options" in asked:
        asked["options"] = "linear_cross_entropy.memory_mib=8"
    checkpointing, frozen = given.pop("checkpointing", False), given.pop("frozen", False)
    ids, dtype = given.pop("ids", None), given.pop("dtype", torch.float32)
    model = tiny_model("llama", dtype, **given)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if frozen:
        model.model.embed_tokens.requires_grad_(False)
    training = Training(model, clock)
    with hf_kernel_patch.patched("measured", models="llama", **asked) as report:
        training.step(ids)
        assert all("no step is timed yet" in text for text in measured(report).values())


def test_names_in_a_config_change_nothing(clock: Clock) -> None:
    with hf_kernel_patch.patched("measured", **ONLY) as report:
        steps_until_chosen(Training(tiny_model("llama"), clock).step, report)
    model = tiny_model("llama")
    model.config._name_or_path = "somebody/else"
    with hf_kernel_patch.patched("measured", **ONLY) as report:
        Training(model, clock).step()
        assert all("from " in text for text in measured(report).values())


def test_a_broken_file_is_told_once_and_measured_anew(
    clock: Clock, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with hf_kernel_patch.patched("measured", **ONLY) as report:
        steps_until_chosen(Training(tiny_model("llama"), clock).step, report)
    (file,) = folder.iterdir()
    file.write_text("{")
    caplog.set_level(logging.INFO, "hf_kernel_patch")
    with hf_kernel_patch.patched("measured", **ONLY) as report:
        steps_until_chosen(Training(tiny_model("llama"), clock).step, report)
        assert all("measured now" in text for text in measured(report).values())
    assert caplog.text.count("cannot be read") == 1
    assert file.read_text() != "{"


def test_a_folder_that_cannot_be_written_is_in_the_report(
    clock: Clock, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file")
    caplog.set_level(logging.INFO, "hf_kernel_patch")
    with hf_kernel_patch.patched("measured", **ONLY) as report:
        steps_until_chosen(Training(tiny_model("llama"), clock).step, report)
        assert "cannot be written" in measured(report)["rope"]
        Training(tiny_model("llama"), clock).step()  # which takes the choice of this process
    assert caplog.text.count("cannot be written") == 1


def test_a_model_with_a_config_that_cannot_be_read_is_measured(clock: Clock, folder: Path) -> None:
    """Nothing tells it from others, so its choice is kept nowhere."""
    model = tiny_model("llama")

    class Odd(type(model.config)):  # type: ignore[misc]
        def to_dict(self) -> dict[str, Any]:
            raise ValueError

    model.config.__class__ = Odd
    with costs(clock), hf_kernel_patch.patched("measured", **ONLY) as report:
        steps_until_chosen(Training(model, clock).step, report)
        assert "left out, 62.5% slower" in measured(report)["rms_norm"]
        assert "measured now, not kept: its key is not known" in measured(report)["rms_norm"]
    assert not folder.exists()


def test_the_log_says_how_long_it_takes_and_what_was_chosen(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hf_kernel_patch")
    with costs(clock), hf_kernel_patch.patched("measured", **ONLY) as report:
        steps_until_chosen(Training(tiny_model("llama"), clock).step, report)
    assert "LlamaForCausalLM, cpu, training: measuring, for at most " in caplog.text
    assert "rms_norm out (62.5% slower with it); rope in (20.0% faster with it)" in caplog.text


def test_a_patch_that_ends_in_the_middle_leaves_nothing(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    kept: list[Any] = []
    with costs(clock):
        with hf_kernel_patch.patched("measured", **ONLY) as report:
            for _ in range(20):
                training.step()
            kept.append(type(training.model.model.norm).forward)
            assert hooks_left() == 1
        assert not hooks_left() and not optimizers._listeners
        begun = clock.now
        training.step()
        kept[0](training.model.model.norm, torch.randn(1, 2, 64))
        assert clock.now == begun + 1
        assert not is_chosen(report)
        with hf_kernel_patch.patched("measured", **ONLY) as report:  # and begins anew
            steps_until_chosen(training.step, report)


def test_an_exception_leaves_nothing(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    with pytest.raises(KeyboardInterrupt), hf_kernel_patch.patched("measured", **ONLY):
        for _ in range(20):
            training.step()
        raise KeyboardInterrupt
    assert not hooks_left()


def test_a_block_within_a_block(clock: Clock) -> None:
    """The inner one measures; after it the outer one goes on."""
    training = Training(tiny_model("llama"), clock)
    with costs(clock), hf_kernel_patch.patched("measured", **ONLY) as outer:
        for _ in range(20):
            training.step()
        with hf_kernel_patch.patched("measured", **{**ONLY, "exclude": f"{OTHERS},rope"}) as inner:
            steps_until_chosen(training.step, inner)
            assert measured(inner).keys() == {"rms_norm"}
            assert not is_chosen(outer)
        steps_until_chosen(training.step, outer)
        assert "left out" in measured(outer)["rms_norm"]


def test_auto_within_a_block_serves_all(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    with costs(clock), hf_kernel_patch.patched("measured", **ONLY) as outer:
        steps_until_chosen(training.step, outer)
        with hf_kernel_patch.patched("auto", **ONLY) as inner:
            begun = clock.now
            training.step()
            assert clock.now == pytest.approx(begun + 1 + 5 * 0.1 - 2 * 0.1)
            assert set(measured(inner).values()) == {""}


def test_many_blocks_keep_no_functions(clock: Clock) -> None:
    from hf_kernel_patch.recognition import composing

    def block() -> None:
        with hf_kernel_patch.patched("measured", **ONLY):
            pass

    block()
    before = len(composing._made)
    for _ in range(3):
        block()
    assert len(composing._made) == before


@pytest.mark.parametrize("scope", ["all models", "one model"])
def test_models_that_are_gone_are_not_kept(clock: Clock, scope: str) -> None:
    model = tiny_model("llama")
    if scope == "one model":
        hf_kernel_patch.apply_default_kernels(model, "measured", exclude=OTHERS)
    else:
        hf_kernel_patch.patch_transformers("measured", **ONLY)
    training = Training(model, clock)
    for _ in range(10):
        training.step()
    gone = weakref.ref(model)
    del model, training
    gc.collect()
    assert gone() is None
    if scope == "one model":
        assert not hooks_left()
        model_patch.release()
    else:
        training = Training(tiny_model("llama", num_hidden_layers=1), clock)
        steps_until_chosen_of = [training.step() for _ in range(90)]
        assert len(steps_until_chosen_of) == 90
        assert "measured now" in measured(hf_kernel_patch.status())["rms_norm"]
    hf_kernel_patch.unpatch()


def test_a_copy_and_a_pickle_of_a_model_that_is_measured(clock: Clock) -> None:
    model = tiny_model("llama")
    hf_kernel_patch.apply_default_kernels(model, "measured", exclude=OTHERS)
    training = Training(model, clock)
    for _ in range(10):
        training.step()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        Training(twin, clock).step()
    hf_kernel_patch.unpatch()
    assert not hooks_left()


def test_reports_can_be_kept_and_pickled(clock: Clock) -> None:
    with hf_kernel_patch.patched("measured", **ONLY) as report:
        steps_until_chosen(Training(tiny_model("llama"), clock).step, report)
        kept = pickle.loads(pickle.dumps(report))
        assert measured(kept) == measured(report)
        assert "; measured now)" in str(report)
        rows = report.as_dict()["rows"]
        assert {row["measured"] for row in rows if row["op"] == "rope"} == {
            measured(report)["rope"]
        }


def test_under_torch_compile_it_is_as_auto(clock: Clock) -> None:
    torch._dynamo.reset()
    model = tiny_model("llama", num_hidden_layers=1).eval()
    with torch.no_grad():
        expected = model(tokens(), use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with hf_kernel_patch.patched("measured", models="llama") as report:
            for _ in range(5):
                found = compiled(tokens(), use_cache=False).logits
                torch.testing.assert_close(found, expected)
            assert set(measured(report).values()) == {"measured: no step is timed yet"}
            hf_kernel_patch.count_calls()
            assert served(report) == 0
    torch._dynamo.reset()


def test_an_optimizer_s_step_that_is_compiled(clock: Clock) -> None:
    torch._dynamo.reset()
    training = Training(tiny_model("llama", num_hidden_layers=1), clock)
    step = torch.compile(training.optimizer.step, backend="eager")
    training.optimizer.step = lambda: step()
    with hf_kernel_patch.patched("measured", **ONLY):
        for _ in range(5):
            training.step()
    torch._dynamo.reset()


def test_a_kernel_that_is_named_for_one_model_serves_whatever_is_measured(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    with (
        kernels(clock, rms_norm=0.1, rope=0.1),
        hf_kernel_patch.patched("measured", **ONLY) as all_,
    ):
        hf_kernel_patch.apply_kernel("timed_rms_norm", model=training.model)
        steps_until_chosen(training.step, all_)
        assert "left out" in measured(all_)["rope"]
        begun = clock.now
        training.step()
        assert clock.now == pytest.approx(begun + 1 + 5 * 0.1)
        hf_kernel_patch.unpatch(training.model)


def test_an_adapted_model(clock: Clock) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    training = Training(peft.get_peft_model(tiny_model("llama"), config), clock)
    with costs(clock), hf_kernel_patch.patched("measured", **ONLY) as report:
        steps_until_chosen(training.step, report)
        assert "left out" in measured(report)["rms_norm"]
        assert "faster" in measured(report)["rope"]


def test_layers_outside_of_any_model_are_as_auto_has_them(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_kernel_patch.measuring import owners

    monkeypatch.setattr(owners, "MOST_IN_VAIN", 3)  # each takes long among many objects
    norm, x = tiny_model("llama").model.norm, torch.randn(1, 2, 64)
    layers = [copy.deepcopy(norm) for _ in range(owners.MOST_IN_VAIN + 3)]
    with kernels(clock, rms_norm=1.0), hf_kernel_patch.patched("measured", models="llama"):
        for layer in layers:
            layer(x)
    assert clock.now == len(layers)

"""What a wrong call is told: the thing, the reason and the way out, in bounded length."""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import hf_kernel_patch as h
from hf_kernel_patch.errors import LONGEST, cut, listed, nearest, unknown
from hf_kernel_patch.patching.report import Outcome, PatchReport, Row
from tests.support.probes import NORM
from tests.support.tiny import tiny_model


class Named(h.BaseKernel):
    kernel_id = "named"


class Odd(h.BaseKernel):
    kernel_id = 5  # type: ignore[assignment]


def generator() -> Iterator[int]:
    yield 1


async def agenerator() -> AsyncIterator[int]:
    yield 1


class Generating:
    def __call__(self) -> Iterator[int]:
        yield 1


Call = Callable[[Any], object]
#: (what is wrong, the call with a model, the error, what its message has to contain)
WRONG: list[tuple[str, Call, type[Exception], list[str]]] = [
    (
        "a model for include",
        lambda model: h.patch_transformers(model),
        TypeError,
        ["the argument include", "not a model", "apply_default_kernels(model)"],
    ),
    (
        "a model type for include",
        lambda _: h.patch_transformers("llama"),
        ValueError,
        ["'llama' is a model type, not a kernel or an op", "models='llama'", "--models"],
    ),
    (
        "a model type without a table for include",
        lambda _: h.patched(["rope", "gpt_neox"]),
        ValueError,
        ["'gpt_neox' is a model type", "models='gpt_neox'"],
    ),
    (
        "a model type for kernels of one model",
        lambda model: h.apply_default_kernels(model, "llama"),
        ValueError,
        ["'llama' is a model type"],
    ),
    (
        "an op for models",
        lambda _: h.patched(models="rope"),
        ValueError,
        ["'rope' is a kernel or an op, not a model type", "include='rope'"],
    ),
    (
        "a function for include",
        lambda _: h.patched(generator),  # type: ignore[arg-type]
        TypeError,
        ["the argument include", "@patched()"],
    ),
    (
        "a kernel for include",
        lambda _: h.patched(Named),  # type: ignore[arg-type]
        TypeError,
        ["takes ids, not kernels", "'named'"],
    ),
    (
        "an unknown name that is like none",
        lambda _: h.patched("zzz"),
        ValueError,
        ["unknown kernel id or op 'zzz'. Known: "],
    ),
    (
        "an unknown name that is like some",
        lambda _: h.patched("rms_nrm"),
        ValueError,
        ["'rms_nrm'; did you mean 'rms_norm'", "? Known: "],
    ),
    (
        "another case",
        lambda _: h.patched("RMS_NORM"),
        ValueError,
        ["'RMS_NORM'; did you mean 'rms_norm'"],
    ),
    (
        "another case of a model type",
        lambda _: h.patched(models="QWEN3"),
        ValueError,
        ["unknown model 'QWEN3'; did you mean 'qwen3'"],
    ),
    (
        "an op for apply_kernel",
        lambda model: h.apply_kernel("rms_norm", model=model),
        ValueError,
        ["'rms_norm' is an op", NORM, "apply_default_kernels(model, 'rms_norm')"],
    ),
    (
        "text for the options of one kernel",
        lambda model: h.apply_kernel(NORM, model=model, options="x=1"),  # type: ignore[arg-type]
        TypeError,
        ["options of apply_kernel must map", "{'exact': True}", "not 'x=1'"],
    ),
    (
        "an option's name that is a number",
        lambda model: h.apply_kernel(NORM, model=model, options={5: 1}),  # type: ignore[dict-item]
        TypeError,
        ["the name of an option is a string, not 5"],
    ),
    (
        "a number for options",
        lambda _: h.patched("rope", options=5),  # type: ignore[arg-type]
        TypeError,
        ["the argument options must map ops", "{'linear_cross_entropy': {'exact': True}}", "not 5"],
    ),
    (
        "a number for an op of options",
        lambda _: h.patched("rope", options={5: {}}),  # type: ignore[dict-item]
        TypeError,
        ["the argument options", "are strings, not 5"],
    ),
    (
        "a number for a leaf or a rule",
        lambda _: h.register_code(5),  # type: ignore[type-var]
        TypeError,
        ["register_code takes a Leaf or a Rule, not 5"],
    ),
    (
        "a number for the name of an architecture",
        lambda _: h.Architecture(5, 6),  # type: ignore[arg-type]
        TypeError,
        ["a name is a string, such as 'llama', not 5"],
    ),
    (
        "a number for the rows of an architecture",
        lambda _: h.Architecture("mine", 6),  # type: ignore[arg-type]
        TypeError,
        ["the rows map names", "{'LlamaMLP.forward': 'gated_product'}", "not 6"],
    ),
    (
        "a row that is no row",
        lambda _: h.Architecture("mine", {"A.forward": ("x", 3)}),  # type: ignore[dict-item]
        TypeError,
        ["a range of versions such as '>=5'", "'A.forward': ('x', 3)"],
    ),
    (
        "a number for a kernel's id",
        lambda _: h.register_kernel(Odd),
        TypeError,
        ["Odd.kernel_id is a string, not 5"],
    ),
    (
        "an unknown kernel for the callback",
        lambda _: h.KernelPatchCallback("nope"),
        ValueError,
        ["unknown kernel id or op 'nope'"],
    ),
    (
        "an unknown option for the callback",
        lambda _: h.KernelPatchCallback("rope", options={"rope": {"nope": 1}}),
        ValueError,
        ["unknown option 'nope' in options of rope"],
    ),
    (
        "the class of a model",
        lambda model: h.apply_kernel(NORM, model=type(model)),
        TypeError,
        ["expected a transformers PreTrainedModel", "got the class LlamaForCausalLM"],
    ),
    (
        "the name of a model",
        lambda _: h.unpatch("llama"),  # type: ignore[arg-type]
        TypeError,
        ["expected a transformers PreTrainedModel", "got 'llama'"],
    ),
    *(
        (f"a generator: {what}", call, TypeError, ["generator", "`with patched(...)` inside it"])
        for what, call in {
            "plain": lambda _: h.patched()(generator),
            "asynchronous": lambda _: h.patched()(agenerator),
            "static": lambda _: h.patched()(staticmethod(generator)),
            "of a class": lambda _: h.patched()(classmethod(generator)),  # type: ignore[arg-type]
            "partial": lambda _: h.patched()(functools.partial(generator)),
            "callable": lambda _: h.patched()(Generating()),
        }.items()
    ),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("call", "error", "parts"), [pytest.param(*one[1:], id=one[0]) for one in WRONG]
)
def test_a_wrong_call_is_told(
    call: Call, error: type[Exception], parts: list[str], model: Any
) -> None:
    with pytest.raises(error) as caught:
        call(model)
    said = str(caught.value)
    assert [part for part in parts if part not in said] == []
    assert len(said) < 1500
    assert not re.search(r"'\w+' Known", said)


def test_a_variable_with_a_model_type_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", "llama")
    with pytest.raises(ValueError, match="'llama' in the variable HF_KERNEL_PATCH is a model type"):
        h.patched()


def test_near_names_ignore_case_and_keep_their_own() -> None:
    assert nearest("LLAMAFORCAUSALLM", ["LlamaForCausalLM", "other"]) == ["LlamaForCausalLM"]
    assert nearest("rope", ["Rope", "ROPE", "x"]) == ["Rope", "ROPE"]
    assert str(unknown("op", "zzz", [])) == "unknown op 'zzz'. Known: none"
    assert str(unknown("op", "zzz", ["a"], "options")) == "unknown op 'zzz' in options. Known: a"


def test_texts_are_cut_at_both_ends() -> None:
    assert cut("x" * LONGEST) == "x" * LONGEST
    assert len(cut("a" + "x" * 999 + "b")) <= LONGEST
    assert cut("a" + "x" * 999 + "b")[::3][0] == "a" and cut("a" + "x" * 999 + "b")[-1] == "b"
    assert listed(["a", "b"], "; ") == "a; b"
    assert listed(map(str, range(150)), "\n").endswith("99\nand 50 more")


def rows(*outcomes: Outcome) -> list[Row]:
    return [Row("x", f"m.{n}", "op", f"kernel_{o}", o) for n, o in enumerate(outcomes)]


def test_the_summary_lists_no_kernel_that_patched_nothing() -> None:
    every = rows(Outcome.PATCHED, Outcome.PENDING, Outcome.SKIPPED, Outcome.SHADOWED)
    summary = PatchReport(every).summary()
    assert summary.endswith("; kernels: kernel_patched, kernel_pending, kernel_shadowed")
    assert PatchReport(rows(Outcome.SKIPPED)).summary() == "1 skipped; kernels: none"

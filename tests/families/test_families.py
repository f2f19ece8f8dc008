"""Every family of transformers: patched by every op it trains and generates as it does without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.families import page, record
from tests.families.building import Case
from tests.families.cases import CASES, CLASSES, SKIPPED
from tests.families.workers import run_alone

RECORDED = transformers.__version__ == record.TRANSFORMERS
#: Families of all supported versions.
SAMPLE = ("gemma2", "gemma3", "llama", "llava", "olmo2", "qwen3", "t5")
#: Cases that are also patched before their module is imported, and one model at a time.
ROUTED = (
    "Gemma3ForConditionalGeneration",
    "LlamaForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "T5ForConditionalGeneration",
)
#: How a class is called that this is about.
LANGUAGE = re.compile(
    r"(?!Auto)(?!\w+PreTrainedModel)"
    r"\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForVisionText2Text|ForProteinText2Text)"
)
#: ``python -m tests.families`` runs them all; a run of the tests takes one of six.
EVERY = 6
HERE = CASES[::EVERY] if RECORDED else [case for case in CASES if case.family in SAMPLE]


@pytest.mark.versions
@pytest.mark.parametrize("case", HERE, ids=[case.id for case in HERE])
def test_family_trains_and_generates_as_the_original(case: Case) -> None:
    result = run_alone(case)
    assert not result.errors, "\n".join(result.errors)
    if RECORDED:
        expected = record.load()[case.family][case.name]["served"]
        assert set(result.served) >= set(expected), "no longer served: python -m tests.families"


@pytest.mark.parametrize("route", ["before", "model"])
@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.skipif(not RECORDED, reason="asked of one version of transformers")
def test_ways_to_patch_are_equal(name: str, route: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    result = run_alone(case, route)
    assert not result.errors, "\n".join(result.errors)
    expected = record.load()[case.family][case.name]["served"]
    assert set(result.served) >= set(expected)


@pytest.mark.skipif(not RECORDED, reason="families come and go with the version")
def test_nine_families_of_ten_are_run_and_the_others_have_a_reason() -> None:
    classes = _classes()
    families, run = set(classes), {case.family for case in CASES}
    assert families - set(SKIPPED) == run
    assert len(run) >= 0.9 * len(families)
    names = {name for family in run for name in classes[family]}
    tried = {case.name for case in CASES}
    assert names - tried == set(CLASSES)


def test_page_is_that_of_the_record() -> None:
    assert page.PATH.read_text(encoding="utf-8") == page.text(record.load())


def test_as_many_families_are_served_as_were_asked_for() -> None:
    totals = page.totals(record.load())
    assert {op: totals[op] for op in page.OPS if totals[op] < page.OPS[op][1]} == {}


def test_record_has_every_case() -> None:
    recorded = {(family, name) for family, found in record.load().items() for name in found}
    assert recorded == {(case.family, case.name) for case in CASES}


def _classes() -> dict[str, set[str]]:
    """Folder of transformers' models -> its classes with a language model's head."""
    found: dict[str, set[str]] = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            if LANGUAGE.fullmatch(name):
                found.setdefault(path.parent.name, set()).add(name)
    return found

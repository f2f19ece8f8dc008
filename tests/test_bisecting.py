"""``bisect``: the sites that change a result are named, one or several, alone or together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import KernelPatchError, KernelPatchWarning, bisect, registry
from hf_kernel_patch.bisecting import Bisection, Search
from hf_kernel_patch.kernels import register_kernel
from hf_kernel_patch.patching.bisection import Trial
from tests.support.pages import blocks
from tests.support.probes import NORM, ROPE, SWIGLU, logits
from tests.support.tiny import tiny_model

MODELLING = "transformers.models.{0}.modeling_{0}.{1}"
MLP = MODELLING.format("llama", "LlamaMLP.forward")


@pytest.fixture
def wrong_swiglu() -> Iterator[str]:
    """A kernel for swiglu that is wrong by a tenth."""
    right = registry.kernels()[SWIGLU]

    def function(*arguments: Any) -> torch.Tensor:
        return 1.1 * right.load()(*arguments)

    members = {"kernel_id": "wrong_swiglu", "function": staticmethod(function)}
    register_kernel(type("Wrong", (right,), members))
    yield "wrong_swiglu"
    del registry.kernels()["wrong_swiglu"]


def searched(
    sites: list[str], *culprits: set[str], most: int = 100
) -> tuple[Bisection, list[Trial]]:
    """What is found where a run is wrong that has patched all of some of these sets."""
    trials: list[Trial] = []

    def run(trial: Trial) -> tuple[bool, list[str]]:
        trials.append(trial)
        patched = [site for site in sites if trial.allows(site)]
        return not any(one <= set(patched) for one in culprits), patched

    return Search(run, most, lambda line: None).result(), trials


SITES = [f"m.Class{number}.forward" for number in range(64)]


@pytest.mark.parametrize("place", [0, 31, 32, 63])
def test_one_site_of_many_takes_the_logarithm_of_runs(place: int) -> None:
    found, trials = searched(SITES, {SITES[place]})
    assert found == Bisection(((SITES[place],),), 64, len(trials))
    assert len(trials) <= 2 + 6 + 1 + 1
    assert trials[0] == Trial(only=frozenset()) and trials[1] == Trial()
    assert trials[-1] == Trial(without=frozenset(found.sites))


@pytest.mark.parametrize("pair", [(0, 1), (0, 63), (20, 40), (31, 32)])
def test_two_sites_that_are_needed_together_are_found_together(pair: tuple[int, int]) -> None:
    wanted = tuple(SITES[place] for place in pair)
    found, trials = searched(SITES, set(wanted))
    assert found.groups == (wanted,) and found.proven
    assert len(trials) <= 2 + 2 * (6 + 1) + 2 + 1
    assert "Only together, these sites change the result:" in str(found)


def test_several_sites_that_are_wrong_by_themselves_are_all_found() -> None:
    found, _ = searched(SITES, {SITES[3]}, {SITES[40]}, {SITES[7], SITES[50]})
    assert set(found.sites) == {SITES[place] for place in (3, 7, 40, 50)}
    assert {frozenset(group) for group in found.groups} == {
        frozenset({SITES[3]}),
        frozenset({SITES[40]}),
        frozenset({SITES[7], SITES[50]}),
    }
    assert found.proven and found.exclude == ",".join(found.sites)


def test_a_site_that_hides_what_others_do_is_no_part_of_them() -> None:
    def run(trial: Trial) -> tuple[bool, list[str]]:
        patched = [site for site in "abcd" if trial.allows(site)]
        wrong = {"a", "d"} <= set(patched) or patched == ["d"]
        return not wrong, patched

    found = Search(run, 50, lambda line: None).result()
    assert found.groups == (("d",),)


def test_the_number_of_runs_is_bounded_and_what_is_known_then_is_told() -> None:
    found, trials = searched(SITES, {SITES[40]}, most=5)
    assert len(trials) == found.runs == 5 and not found.proven
    assert SITES[40] in found.sites and len(found.sites) < 64
    assert "Not proven: after 5 runs" in str(found)
    for most in (1, True, "many"):
        with pytest.raises(ValueError, match="max_runs is a number of at least 2"):
            searched(SITES, most=most)  # type: ignore[arg-type]


def test_sites_that_are_only_patched_later_on_are_found_as_well() -> None:
    """As those of a model that is imported after the place where the program has failed."""

    def run(trial: Trial) -> tuple[bool, list[str]]:
        if trial.allows("m.First.forward"):
            return False, ["m.First.forward", "m.Other.forward"]
        return not trial.allows("m.Later.forward"), ["m.Other.forward", "m.Later.forward"]

    found = Search(run, 50, lambda line: None).result()
    assert found.groups == (("m.First.forward",), ("m.Later.forward",))


def test_nothing_to_find_and_what_no_site_has_done() -> None:
    assert "all 64 sites patched" in str(searched(SITES)[0])
    assert "no site was patched" in str(searched([])[0])
    with pytest.raises(KernelPatchError, match="wrong without any patch"):
        Search(lambda trial: (False, []), 9, print).result()
    with pytest.raises(KernelPatchError, match="wrong although no site is patched"):
        Search(lambda trial: (trial != Trial(), []), 9, print).result()


def test_a_wrong_kernel_is_found_in_a_real_model(
    wrong_swiglu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama").eval()
    truth = logits(model)

    def right() -> bool:
        return torch.allclose(logits(model), truth, atol=1e-4)

    found = bisect(right, f"{wrong_swiglu},{NORM},{ROPE}", models="llama")
    assert found.groups == ((MLP,),)
    assert not hf_kernel_patch.status().rows and right()
    printed = capsys.readouterr().out
    assert "run 1, nothing patched: right" in printed
    assert f"run 2, everything patched ({found.considered} sites): wrong" in printed
    assert str(found).splitlines() == [
        "This site changes the result:",
        f"  {MLP}",
        "Leave it to the original by",
        f'  exclude="{MLP}"',
        f"With it the result was right. ({found.runs} runs)",
    ]
    kernels = f"{wrong_swiglu},{NORM},{ROPE}"
    with hf_kernel_patch.patched(kernels, models="llama", exclude=found.exclude, strict=True):
        assert right()
    again = bisect(right, kernels, models="llama", exclude=found.exclude, progress=str)
    assert not again.groups and again.considered == 2


def test_an_exception_is_wrong_and_a_function_may_patch_one_model_itself(
    wrong_swiglu: str,
) -> None:
    model = tiny_model("llama").eval()
    truth = logits(model)
    lines: list[str] = []

    def right() -> bool:
        hf_kernel_patch.apply_default_kernels(model, f"{NORM},{wrong_swiglu}")
        torch.testing.assert_close(logits(model), truth)
        return True

    found = bisect(right, None, progress=lines.append)
    assert found.groups == ((MLP,),)
    assert any(line.startswith("AssertionError: 'Tensor-likes are not close") for line in lines)
    assert not hf_kernel_patch.status().rows


def test_what_does_not_work_is_told_before_anything_runs() -> None:
    def never() -> bool:
        raise AssertionError("it ran")

    with pytest.raises(TypeError, match="bisect takes a function, not 3"):
        bisect(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'rope'"):
        bisect(never, "ropee")
    with (
        hf_kernel_patch.patched(NORM, models="llama"),
        pytest.raises(KernelPatchError, match=r"call unpatch\(\) first"),
    ):
        bisect(never, NORM)
    with pytest.raises(TypeError, match="whether its result is right, not None"):
        bisect(lambda: None, NORM, models="llama", progress=str)
    with pytest.raises(AssertionError, match="it ran"):  # without a patch: it is not ours
        bisect(never, NORM, models="llama", progress=str)


def test_it_says_where_everything_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH_DISABLE", "1")
    with pytest.raises(KernelPatchError, match="HF_KERNEL_PATCH_DISABLE is set"):
        bisect(lambda: True, NORM)


def test_what_is_skipped_is_told_once() -> None:
    with pytest.warns(KernelPatchWarning, match="no site matches") as told:
        bisect(lambda: True, NORM, models="llama", exclude="*.LlamaMPL.forward", progress=str)
    assert len([one for one in told if one.category is KernelPatchWarning]) == 1


def test_the_examples_of_its_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    excluding, bisecting = blocks("bisect.md", "python")
    exec(excluding, {})
    assert "LlamaMLP.forward -> torch_fused_swiglu: excluded by" in capsys.readouterr().out
    exec(bisecting, {})
    assert "Nothing to find: the result is right with all" in capsys.readouterr().out

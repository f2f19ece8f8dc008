"""What sends a norm's call back to the original, and what is replaced later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.norm_originals import EACH, WIDTH, inputs, patched
from tests.support.ops.inputs import F32
from tests.support.probes import fallbacks, served

pytestmark = pytest.mark.versions
every = pytest.mark.parametrize("name", EACH)


# -- what sends a call back


@every
def test_whole_numbers_take_the_original(name: str) -> None:
    one = EACH[name]
    norm = one.made()

    def run() -> list[torch.Tensor]:
        found = []
        for dtype in (torch.int64, torch.int32, torch.bool):
            out = norm(*[(10 * x.detach()).to(dtype) for x in inputs(one, F32)])
            found.append(out)
            if out.requires_grad:
                found += torch.autograd.grad(out.sum(), list(norm.parameters()))
        return found

    eager = run()
    with patched(one) as report:
        found = run()
    assert all(map(torch.equal, found, eager))
    assert fallbacks(report) == {"x is not of floating point": 3}


@pytest.mark.filterwarnings("ignore:Casting complex values")
@every
def test_dtypes_that_no_kernel_has_take_the_original(name: str) -> None:
    one = EACH[name]
    norm = one.made()

    def run() -> list[Any]:
        found: list[Any] = []
        for dtype in (torch.float64, torch.complex64, torch.float8_e4m3fn):
            try:
                found.append(norm(*[x.detach().to(dtype) for x in inputs(one, F32)]))
            except (RuntimeError, TypeError, ValueError) as raised:
                found.append(f"{type(raised)} {raised}")
        return found

    eager = run()
    with patched(one) as report:
        found = run()
    for ours, theirs in zip(found, eager, strict=True):
        assert torch.equal(ours, theirs) if torch.is_tensor(theirs) else ours == theirs
    assert served(report) == 0


@pytest.mark.parametrize("name", [n for n, one in EACH.items() if list(one.made().parameters())])
def test_a_weight_elsewhere_or_of_another_width_or_none_takes_the_original(name: str) -> None:
    one = EACH[name]
    norm, given = one.made(), inputs(one, F32)

    def run() -> Any:
        try:
            return norm(*given)
        except (RuntimeError, TypeError, AttributeError) as raised:
            return type(raised), str(raised)

    weight = norm.weight
    weights = weight[:1], weight.to("meta"), weight.expand(2, WIDTH), None

    def each() -> list[Any]:
        found = []
        for other in weights:
            norm.weight = None if other is None else torch.nn.Parameter(other.detach())
            found.append(run())
        return found

    eager = each()
    with patched(one) as report:
        found = each()
    assert served(report) == 0
    for ours, theirs in zip(found, eager, strict=True):
        if torch.is_tensor(theirs):
            assert ours.device == theirs.device
            assert theirs.is_meta or torch.equal(ours, theirs)
        else:
            assert ours == theirs


@pytest.mark.parametrize(
    "name",
    [n for n, one in EACH.items() if not one.gated and not {"group_size", "config"} & {*one.given}],
)
def test_a_point_takes_the_original(name: str) -> None:
    one = EACH[name]
    norm, point = one.made(), torch.tensor(2.0)
    eager = norm(point)
    with patched(one) as report:
        assert torch.equal(norm(point), eager)
    assert served(report) == 0


# -- what is replaced later

METHODS = [name for name, one in EACH.items() if hasattr(one.kind(), "_norm")]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("on", ["class", "instance"])
def test_a_norm_that_is_replaced_later_runs(
    name: str, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = EACH[name]
    norm, given = one.made(), inputs(one, F32)
    plain, original = norm(*given), norm._norm
    with patched(one) as report:
        assert torch.equal(norm(*given), plain)
        if on == "class":
            monkeypatch.setattr(one.kind(), "_norm", lambda self, x: 2 * original(x))
        else:
            monkeypatch.setattr(norm, "_norm", lambda x: 2 * original(x))
        assert torch.equal(norm(*given), 2 * plain)
        assert served(report) == 1
        assert any("_norm was replaced" in why for why in fallbacks(report))
        monkeypatch.undo()
        assert torch.equal(norm(*given), plain)
        assert served(report) == 2


#: (class, attribute, other values) that a module may be given after the patch.
LATER: list[tuple[str, str, tuple[Any, ...]]] = [
    ("Gemma3nRMSNorm", "with_scale", (False,)),
    ("Gemma4RMSNorm", "with_scale", (False,)),
    ("Qwen4ExpTextRMSNorm", "group_size", (3, None)),
    ("Zamba2RMSNormGated", "group_size", (3, 33)),
    ("KimiLinearRMSNormGated", "activation", ("silu", "gelu", "sigmoid")),
    ("LaraMiniRMSNormGated", "activation", ("sigmoid", "relu")),
    ("T5LayerNorm", "variance_epsilon", (0.5,)),
    ("Llama4TextL2Norm", "eps", (0.5,)),
    ("CpmAntLayerNorm", "eps", (0.5,)),
]


@pytest.mark.parametrize(
    ("name", "attribute", "values"),
    [row for row in LATER if any(one.name == row[0] for one in EACH.values())],
)
def test_attributes_are_read_at_each_call(
    name: str, attribute: str, values: tuple[Any, ...]
) -> None:
    one = next(one for one in EACH.values() if one.name == name)
    norm, given = one.made(), inputs(one, F32)
    with patched(one) as report:
        norm(*given)
        for value in values:
            setattr(norm, attribute, value)
            found = norm(*given)
            eager = one.kind().forward.__wrapped__(norm, *given)
            assert torch.equal(found, eager)
        back = sum(fallbacks(report).values())
        assert served(report) + back == 1 + len(values)
        assert back == len({"gelu", "relu"} & set(map(str, values)))

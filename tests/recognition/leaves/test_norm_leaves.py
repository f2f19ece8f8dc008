"""The leaves of norms, each against the classes of transformers that it was written for."""

from __future__ import annotations

import pytest
import torch
import transformers

import hf_kernel_patch
from tests.support.norm_originals import EACH, WIDTH, inputs, outcome, patched
from tests.support.ops.inputs import BF16, F16, F32, draw
from tests.support.probes import fallbacks, served
from tests.support.tiny import error

pytestmark = pytest.mark.versions
every = pytest.mark.parametrize("name", EACH)


#: How far gradients may be from eager's.
NEAR = {F32: 2e-6, F16: 2e-3, BF16: 1.5e-2}
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32), (F32, F16)]


CALLS = [
    *((*dtypes, "contiguous", (2, 7, WIDTH)) for dtypes in DTYPES),
    *((F32, F32, layout, (2, 7, WIDTH)) for layout in ("half", "sliced", "transposed", "expanded")),
    *((F32, F32, "contiguous", shape) for shape in ((WIDTH,), (1, WIDTH), (2, 3, 5, WIDTH))),
]


@every
def test_the_same_bits_and_gradients(name: str) -> None:
    one = EACH[name]

    def run() -> list[list[torch.Tensor]]:
        found = []
        for dtype, weight, layout, shape in CALLS:
            count = 2 if one.gated else 1
            given = [draw(shape, dtype, seed=5 + i, layout=layout) for i in range(count)]
            found.append(outcome(one.made(weight), given))
        return found

    eager = run()
    with patched(one) as report:
        fused = run()
    assert served(report) == len(CALLS)
    for call, found, wanted in zip(CALLS, fused, eager, strict=True):
        assert torch.equal(found[0], wanted[0]), call
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == theirs.dtype, call
            assert error(ours, theirs) < max(NEAR[call[0]], NEAR[call[1]]), call
    assert all(map(torch.equal, run()[0], eager[0]))


@every
def test_what_needs_no_gradient_gets_none(name: str) -> None:
    one = EACH[name]
    norm, original = one.made().requires_grad_(False), one.kind().forward
    given = inputs(one, F32)
    with patched(one):
        assert norm(*[x.detach() for x in given]).grad_fn is None
        for i in range(len(given)):
            wanted = [x if i == j else x.detach() for j, x in enumerate(given)]
            (grad,) = torch.autograd.grad(norm(*wanted).sum(), given[i])
            assert grad.shape == given[i].shape
        for parameter in norm.requires_grad_().parameters():
            alone = [x.detach() for x in given]
            (found,) = torch.autograd.grad(norm(*alone).sum(), parameter)
            (eager,) = torch.autograd.grad(original(norm, *alone).sum(), parameter)
            assert error(found, eager) < 2e-6


@every
def test_hooks_run(name: str) -> None:
    one = EACH[name]
    norm, given, seen = one.made(), inputs(one, F32), []
    norm.register_forward_hook(lambda module, args, out: seen.append(out))
    with patched(one) as report:
        out = norm(*given)
    assert seen[0] is out
    assert served(report) == 1


def test_a_class_in_place_of_t5s_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As apex's norm once took its place."""
    one = EACH["T5LayerNorm"]

    class FusedRMSNorm(torch.nn.RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 2

    monkeypatch.setattr(one.modelling(), "T5LayerNorm", FusedRMSNorm)
    norm, x = one.modelling().T5LayerNorm(WIDTH), inputs(one, F32)[0]
    eager = norm(x)
    why = "other code than the leaf"
    with pytest.raises(hf_kernel_patch.KernelPatchError, match=why), patched(one):
        pass
    assert torch.equal(norm(x), eager)


def test_a_t5_in_half_precision_whose_wo_is_kept_in_float32() -> None:
    one = EACH["T5LayerNorm"]
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, vocab_size=64, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).bfloat16().eval()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    tokens = torch.arange(1, 15).view(2, 7)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(input_ids=tokens, labels=tokens)
        out.loss.backward()
        return [out.logits.detach(), *[p.grad.clone() for p in model.parameters()]]

    eager = run()
    with patched(one) as report:
        found = run()
    assert torch.equal(found[0], eager[0])
    assert max(map(error, found, eager)) < 3e-2
    assert served(report) == 12
    assert not fallbacks(report)

"""The options of the loss's kernel: what they change in a model's output, and nothing else."""

from __future__ import annotations

import pytest
import torch

import hf_kernel_patch
from tests.recognition.rules.head_loss.steps import LOSS, labels
from tests.support.tiny import tiny_model, tokens


def test_options_reach_the_kernel_and_leave_the_loss_alone_or_add_the_z_loss() -> None:
    model = tiny_model("llama").train()
    eager = model(tokens(), labels=labels())
    log = eager.logits[:, :-1].logsumexp(-1)[labels()[:, 1:] != -100]
    given = {"exact": True, "memory_mib": 1, "metrics": True, "z_loss": 0.25}
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True, options={LOSS: given}):
        inside = model(tokens(), labels=labels())
    torch.testing.assert_close(inside.loss, eager.loss + 0.25 * log.square().mean())
    counted = eager.logits[:, :-1][labels()[:, 1:] != -100]
    right = counted.argmax(-1) == labels()[:, 1:][labels()[:, 1:] != -100]
    entropy = torch.distributions.Categorical(logits=counted).entropy().mean()
    torch.testing.assert_close(inside.token_accuracy, right.float().mean())
    torch.testing.assert_close(inside.mean_entropy, entropy)
    assert list(inside) == [*eager, "token_accuracy", "mean_entropy"]


BESIDES = {LOSS: {"metrics": True, "z_loss": 0.25}}


def test_options_hold_where_the_original_computes_the_loss() -> None:
    model = tiny_model("llama").train()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True, options=BESIDES):
        served = model(tokens(), labels=labels())
        loss, logits, *_ = model(tokens(), labels=labels(), return_dict=False)
        model.lm_head.register_forward_hook(lambda *_: None)
        inside = model(tokens(), labels=labels())
    torch.testing.assert_close(loss, served.loss)
    assert torch.equal(logits, served.logits)
    for name in ("loss", "token_accuracy", "mean_entropy"):
        torch.testing.assert_close(inside[name], served[name])


def test_an_evaluation_s_loss_is_the_original_s() -> None:
    model = tiny_model("llama").eval()
    eager = model(tokens(), labels=labels())
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True, options=BESIDES):
        inside = model(tokens(), labels=labels())
    assert torch.equal(inside.loss, eager.loss)
    assert inside.token_accuracy is inside.mean_entropy is None


@pytest.mark.parametrize("by", ["settings", "kernel"])
def test_logits_come_at_once_when_asked_for(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_kernel_patch.ops.linear_cross_entropy import TorchFusedLinearCrossEntropy as Kernel

    model = tiny_model("llama").train()
    eager = model(tokens(), labels=labels())
    asked = {"return_logits": True}
    if by == "kernel":
        monkeypatch.setattr(Kernel, "options", {**Kernel.options, **asked})
    settings = {LOSS: asked} if by == "settings" else {}
    hf_kernel_patch.apply_default_kernels(model, LOSS, options=settings)
    inside = model(tokens(), labels=labels())
    hf_kernel_patch.unpatch(model)
    assert type(inside) is type(eager)
    assert torch.equal(vars(inside)["logits"], eager.logits)

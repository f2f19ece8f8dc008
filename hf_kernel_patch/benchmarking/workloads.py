"""What is measured of a model: a training step, and decoding by ``generate``."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.errors import cut

if TYPE_CHECKING:
    import torch
    from torch import nn

TRAINING, DECODING = "training", "decoding"
#: Arguments of a forward that ``generate`` does not take.
_OF_TRAINING = ("labels", "decoder_input_ids", "decoder_attention_mask", "num_items_in_batch")


@dataclass(frozen=True)
class Workload:
    """One thing that is measured.

    Attributes:
        name: ``TRAINING`` or ``DECODING``.
        tokens: how many each call goes through, or gives.
        prepare: is called before each call, untimed.
        call: what is timed; takes what is called in place of the model, the model itself or what
            torch.compile has made of it.
        tidy: is called afterwards, untimed, also after an error.
    """

    name: str
    tokens: int
    prepare: Callable[[], None]
    call: Callable[[Any], None]
    tidy: Callable[[], None]


def training(model: nn.Module, batch: Mapping[str, Any], seed: int) -> Workload:
    """Forward with labels and backward; the gradients are gone afterwards."""
    parameters = list(model.parameters())

    def prepare() -> None:
        model.train()
        _seed(seed)

    def call(called: Any) -> None:
        import torch

        with torch.enable_grad():
            _loss(called(**batch)).backward()

    def tidy() -> None:
        for one in parameters:
            one.grad = None

    return Workload(TRAINING, _positions(model, batch), prepare, call, tidy)


def decoding(model: nn.Module, batch: Mapping[str, Any], new: int, seed: int) -> Workload:
    """Greedy decoding of ``new`` tokens for each sequence, reading the prompt included."""
    prompt = {name: value for name, value in batch.items() if name not in _OF_TRAINING}
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "min_new_tokens": new,  # or one variant might stop early
        "do_sample": False,
        "num_beams": 1,
        "use_cache": True,
    }
    settled: Any = getattr(model, "generation_config", None)
    if getattr(settled, "pad_token_id", None) is None:
        options["pad_token_id"] = 0  # which nothing reads, and without it there is a warning

    def prepare() -> None:
        model.eval()
        _seed(seed)

    def call(called: Any) -> None:
        import torch

        with torch.no_grad():
            called.generate(**prompt, **options)

    return Workload(DECODING, new * _sequences(batch), prepare, call, lambda: None)


def why_not_decoding(model: nn.Module, batch: Mapping[str, Any]) -> str:
    """Why nothing can be decoded, or ""."""
    able = getattr(model, "can_generate", None)
    if not callable(getattr(model, "generate", None)) or (callable(able) and not able()):
        return f"{cut(type(model).__qualname__)} does not generate text"
    return ""


def why_not_training(model: nn.Module, batch: Mapping[str, Any]) -> str:
    """Why there is no training step, or "": what is told without a try, in plain words."""
    if not any(one.requires_grad for one in model.parameters()):
        return "no parameter requires a gradient"
    if "labels" not in batch and "labels" in inspect.signature(model.forward).parameters:
        return "the batch has no labels, without which the model gives no loss"
    for name, one in model.named_parameters():
        if getattr(one, "_post_accumulate_grad_hooks", None):
            return f"{cut(name)} has a hook on its gradient, which might change the weights"
    return ""


#: Workload -> why a model and a batch cannot be tried with it, or "".
WHY_NOT = {TRAINING: why_not_training, DECODING: why_not_decoding}


def sizes_of(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """Sequences, and positions of each where the batch has token ids."""
    ids = batch.get("input_ids")
    return tuple(ids.shape[:2]) if ids is not None else (_sequences(batch),)


def _loss(output: Any) -> torch.Tensor:
    loss: Any = output[0] if isinstance(output, tuple) and output else getattr(output, "loss", None)
    if not hasattr(loss, "backward"):
        raise ValueError("the output has no loss; give the labels in the batch")
    found: torch.Tensor = loss.mean()  # of several devices
    return found


def _seed(seed: int) -> None:
    """The same random numbers for every call, such as those of dropout."""
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _positions(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Positions of the batch, padding included; of both sides of an encoder-decoder."""
    sides: list[tuple[str, ...]] = [("input_ids", "inputs_embeds")]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        sides.append(("decoder_input_ids", "labels"))
    given = [next((batch[name] for name in side if name in batch), None) for side in sides]
    counted = [one.shape[0] * one.shape[1] for one in given if one is not None and one.dim() > 1]
    return sum(counted) or _sequences(batch)


def _sequences(batch: Mapping[str, Any]) -> int:
    first = batch.get("input_ids")
    shapes = [first] if first is not None else list(batch.values())
    return next((len(one) for one in shapes if getattr(one, "dim", lambda: 0)() > 0), 1)

"""Two worlds: transformers' own modelling modules, and copies of them that nothing patches."""

from __future__ import annotations

import copy
import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from tests.support.scope import build
from tests.support.tiny import VOCABULARY

REAL, PLAIN = "real", "plain"
FAMILIES = ("llama", "qwen3", "gemma2", "qwen3_moe")
#: A family whose modelling module is imported anew.
LATE = "smollm3"
#: What a call of one of the user's own functions is counted in: (its tag) by world.
calls: dict[str, Counter[str]] = {REAL: Counter(), PLAIN: Counter()}
_now: list[str] = [REAL]


class Violation(AssertionError):
    """A guarantee does not hold. ``kind`` is one word or two, by which a shrinker compares."""

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)
        self.kind = kind

    def __str__(self) -> str:
        return ": ".join(self.args)


def called(tag: str) -> None:
    """One of the user's own functions was called in the world that runs now."""
    calls[_now[0]][tag] += 1


def in_world(world: str, do: Callable[[], Any]) -> Any:
    """Do something whose calls of the user's functions count for that world."""
    before, _now[0] = _now[0], world
    try:
        return do()
    finally:
        _now[0] = before


def real(family: str) -> Any:
    """The modelling module of transformers."""
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def plain(family: str) -> Any:
    """Its copy: the same source, other classes and functions.

    By its name it belongs to a package whose classes this one does not look at, as it does at
    those of any user who builds a PreTrainedModel.
    """
    name = f"accelerate.plain_modeling_{family}"
    if name not in sys.modules:
        original = real(family)
        module = ModuleType(name)
        module.__package__, module.__file__ = original.__package__, original.__file__
        sys.modules[name] = module
        source = Path(original.__file__).read_text(encoding="utf-8")
        exec(compile(source, original.__file__, "exec"), vars(module))
    return sys.modules[name]


class Pair:
    """A model and its twin, with the same weights and the same history."""

    def __init__(self, family: str, name: str, real: Any, plain: Any):
        self.family, self.name = family, name
        self.model, self.twin = real, plain
        #: The user has set or removed a forward, a hook or a child somewhere inside.
        self.touched = False

    def both(self) -> tuple[tuple[str, Any], tuple[str, Any]]:
        return (REAL, self.model), (PLAIN, self.twin)

    def __repr__(self) -> str:
        return f"{self.name}:{self.family}"


def new_pair(family: str, name: str) -> Pair:
    """Built now, whatever is in force, with weights that depend on the family alone."""
    model = build(family)
    kind = getattr(plain(family), type(model).__name__)
    twin = kind(copy.deepcopy(model.config))
    twin.load_state_dict(model.state_dict())
    return Pair(family, name, model.train(), twin.train())


def ids(seed: int) -> torch.Tensor:
    """(2, 6) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (2, 6), generator=generator)


def training(model: Any, seed: int, read_logits: bool) -> dict[str, torch.Tensor]:
    """Loss, every gradient and perhaps logits of a forward and a backward."""
    model.zero_grad()
    tokens = ids(seed)
    # Else a recomputed layer ends where nothing more is saved, which fused code does earlier.
    with set_checkpoint_early_stop(False):
        result = model(tokens, labels=tokens)
    found = {"loss": result.loss.detach()}
    if read_logits:
        found["logits"] = result.logits.detach().clone()
    result.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    model.zero_grad()
    return found


def evaluated(model: Any, seed: int, read_logits: bool = True) -> dict[str, torch.Tensor]:
    """The logits without gradients."""
    with torch.no_grad():
        return {"logits": model(ids(seed)).logits.clone()}


def generated(model: Any, seed: int, read_logits: bool = True) -> dict[str, torch.Tensor]:
    """Three tokens of greedy decoding, and their scores."""
    was = model.training
    model.eval()
    try:
        found = model.generate(
            ids(seed),
            attention_mask=torch.ones_like(ids(seed)),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    finally:
        model.train(was)
    return {"logits": torch.stack(found.logits)}


def outcome(do: Callable[[], Any]) -> tuple[Any, str]:
    """(result, "") or (None, what kind of error it raised)."""
    try:
        return do(), ""
    except Exception as error:
        if isinstance(error, Violation):
            raise
        return None, f"{type(error).__name__}: {str(error)[:300]}"


def differences(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> list[str]:
    """What differs by more than rounding."""
    if found.keys() != truth.keys():
        return [f"only one has {sorted(found.keys() ^ truth.keys())[:6]}"]
    wrong = []
    scale = max((float(t.double().norm()) for n, t in truth.items() if n != "logits"), default=0.0)
    for name, expected in truth.items():
        difference = float((found[name].double() - expected.double()).norm())
        limit = 5e-5 * float(expected.double().norm()) + 1e-6 * scale
        if not difference <= limit and not torch.equal(found[name], expected):
            wrong.append(f"{name} is {difference:.2e} off (limit {limit:.2e})")
    return wrong

"""How a run in float64 stays one, and how all runs of a model send tokens the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Choices:
    """The indices that a first run chose by top-k and argmax, in the order of the calls.

    Later runs take the same: a rounding would otherwise send a token to another expert, which
    says nothing about what a kernel computes.
    """

    def __init__(self) -> None:
        self.indices: list[torch.Tensor] | None = None


@contextmanager
def steered(choices: Choices, wide: bool = False) -> Iterator[None]:
    """Take the choices of the first run, or note them in the first; if ``wide``, keep float64.

    A model's own code casts to float32 in places, as norms and rotary embeddings do. If ``wide``,
    every cast to a narrower float goes to float64.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_default_dtype()
    kinds = {device, "cpu"}
    off = [torch.autocast(kind, enabled=False) if wide else nullcontext() for kind in kinds]
    try:
        if wide:
            torch.set_default_dtype(torch.float64)
        with off[0], off[-1] if len(off) > 1 else nullcontext(), _mode()(choices, wide):
            yield
    finally:
        torch.set_default_dtype(before)


@cache
def _mode() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    narrower = {torch.float32, torch.bfloat16, torch.float16}
    casts = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
    choosing = {torch.topk, torch.Tensor.topk, torch.argmax, torch.Tensor.argmax}

    def widened(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value in narrower else value

    class Mode(TorchFunctionMode):
        def __init__(self, choices: Choices, wide: bool):
            super().__init__()
            self._wide, self._place = wide, 0
            self._noted: list[torch.Tensor] = []
            self._choices = choices
            self._given = choices.indices

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if self._wide:
                func = torch.Tensor.double if func in casts else func
                args = tuple(map(widened, args))
                kwargs = {name: widened(value) for name, value in kwargs.items()}
            result = func(*args, **kwargs)
            return self._chosen(args, kwargs, result) if func in choosing else result

        def _chosen(self, args: Any, kwargs: Any, result: Any) -> Any:
            many = isinstance(result, tuple)
            index = result[1] if many else result
            if self._given is None:
                self._noted.append(index)
                return result
            place, self._place = self._place, self._place + 1
            if place >= len(self._given) or self._given[place].shape != index.shape:
                return result  # another function than the first run's has asked
            taken = self._given[place].to(index.device)
            if not many:
                return taken
            dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
            held = args[0] if args else kwargs["input"]
            return torch.return_types.topk((held.gather(dim, taken), taken))

        def __exit__(self, *error: Any) -> Any:
            if self._given is None:
                self._choices.indices = self._noted
            return super().__exit__(*error)

    return Mode

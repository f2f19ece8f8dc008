"""``torch.topk`` of few rows, as routers call it, by one launch where a token is captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_kernel_patch.recognition.rules.decoding.listening import listening


@contextmanager
def choosing() -> Iterator[None]:
    """``torch.topk`` is ours for what it takes."""
    import torch

    from hf_kernel_patch.ops.top_k.triton import fits, top_k

    def chosen(function: Any, *args: Any, **options: Any) -> Any:
        if (call := _plain(args, options)) is not None:
            x, k = call
            if type(x) is torch.Tensor and x.is_cuda and fits(x, k):
                return torch.return_types.topk(top_k(x, k))
        return function(*args, **options)

    with listening({torch.topk: chosen, torch.Tensor.topk: chosen}):
        yield


def _plain(args: Any, options: Any) -> tuple[Any, int] | None:
    """(x, k) of a call along the last dimension for the largest in order, or None for others."""
    names = "input", "k", "dim", "largest", "sorted"
    given = {**dict(zip(names, args)), **options}
    if "self" in given:
        given["input"] = given.pop("self")
    x, k, dim = given.get("input"), given.get("k"), given.get("dim", -1)
    if x is None or type(k) is not int or given.get("out") is not None or not x.dim():
        return None
    if dim not in (-1, x.dim() - 1) or not given.get("largest", True):
        return None
    return x, k

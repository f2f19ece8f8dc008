"""How often each operator ran on the simulated device."""

from __future__ import annotations

from collections import Counter

_calls: Counter[str] = Counter()


def calls() -> dict[str, int]:
    """Operator name -> calls since the last reset: "npu_rms_norm", "mm", "add.Tensor", ...

    An overload is named after a dot; one of torch_npu's has no leading underscore.
    """
    return dict(_calls)


def reset_calls() -> None:
    _calls.clear()


def count(name: str) -> None:
    _calls[name] += 1

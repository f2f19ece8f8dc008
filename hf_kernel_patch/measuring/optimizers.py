"""Being told when an optimizer of torch has made a step, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_kernel_patch.recognition.modules import compiling

_listeners: list[Callable[[Any], None]] = []
_hook: Any = None


def listen(listener: Callable[[Any], None]) -> None:
    """Call a function with the optimizer after each step, until it is given to ``stop``."""
    global _hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    _listeners.append(listener)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_stepped)


def stop(listener: Callable[[Any], None]) -> None:
    """Call it no longer; without listeners torch knows nothing of us."""
    global _hook
    if listener in _listeners:
        _listeners.remove(listener)
    if not _listeners and _hook is not None:
        _hook.remove()
        _hook = None


def _stepped(optimizer: Any, *_: object) -> None:
    if compiling():  # an optimizer's step, which cannot be timed from inside
        return
    for listener in list(_listeners):
        listener(optimizer)

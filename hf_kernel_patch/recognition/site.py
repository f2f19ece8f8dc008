"""What a replacement knows at call time: who serves it, for whom, and what its calls met."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from hf_kernel_patch.kernels import BaseKernel, Kernel
from hf_kernel_patch.recognition.modules import compiling, hooked_everywhere
from hf_kernel_patch.recognition.outcome import SERVED, CallOutcome, How, fallback

if TYPE_CHECKING:
    from torch import nn

#: Whether calls are counted.
counting = False
#: Whether models decode tokens from CUDA graphs.
capturing = True

Counters = list[Counter[CallOutcome]]
#: (scope or None for the module's class, name, value): a function that fused code takes the
#: place of, and where the original would find it.
Swallowed = tuple[Mapping[str, Any] | None, str, Any]


def count_calls(enabled: bool) -> None:
    """Switch the counting of calls on or off, for all sites."""
    global counting
    counting = enabled


def capture_decoding(enabled: bool) -> None:
    """Switch CUDA graphs of decoded tokens on or off, for all sites."""
    global capturing
    capturing = enabled


class Site:
    """One kernel on one function: the op to run, the original for fallbacks, and counters.

    ``options`` are the kernel's own, with what was asked for in place of their defaults.
    ``active`` says whether a patch holds it in force; without, the original's code runs, since
    somebody may have kept the function.
    """

    __slots__ = (
        "__weakref__",
        "_chooses",
        "_compiling",
        "_guard",
        "_number",
        "active",
        "counters",
        "explicit",
        "kernel",
        "modules",
        "on_release",
        "op",
        "options",
        "original",
        "swallowed",
    )

    def __init__(
        self,
        kernel: Kernel,
        original: Callable[..., Any] | None,
        explicit: bool,
        options: Mapping[str, object] | None = None,
        alone: bool = False,
    ):
        self.kernel = kernel
        self.op = kernel.load()
        #: None for the interface of experts, which has none.
        self.original: Any = original
        self.explicit = explicit
        #: Whether ``no_gain`` is asked at each call: of a kernel that was not named and has one.
        self._chooses = not explicit and (
            kernel.no_gain.__func__ is not BaseKernel.no_gain.__func__  # type: ignore[attr-defined]
        )
        self.options = {**kernel.options, **(options or {})}
        self.active = False
        #: What to do when the last patch lets go of the site.
        self.on_release: Callable[[], None] | None = None
        #: One for each global patch that holds the site, so that each counts its own calls.
        self.counters: Counters = []
        #: In the scope of single models: id of a module in whose class it is in force -> counters.
        self.modules: dict[int, Counters] | None = {} if alone else None
        self.swallowed: tuple[Swallowed, ...] = ()
        import torch

        from hf_kernel_patch.ops._shared.guard import why_fallback

        self._guard, self._compiling = why_fallback, torch.compiler.is_compiling
        # They keep what they import at their first call, which is not to be in a compiled graph.
        hooked_everywhere()
        compiling()
        self._number = next(_numbers)
        _sites[self._number] = self

    def in_force(self, module: nn.Module | None = None) -> bool:
        """Whether the kernel may serve a call, of this module where one is known."""
        if not self.active:
            return False
        if self.modules is None or module is None or self._compiling():
            return True
        # A replica of DataParallel is a copy that lives for one call.
        return id(module) in self.modules or getattr(module, "_is_replica", False)

    def falls_back(
        self, *arguments: object, unless: str | None = None, module: nn.Module | None = None
    ) -> bool:
        """Whether this call falls back to the original; ``arguments`` are the op's.

        ``unless`` is a reason that the caller has found already, ``module`` whose call it is.
        """
        if not self.in_force(module):
            return True
        reason = (
            unless
            or (self.swallowed and self._replaced(module))
            or self._guard(self.kernel, arguments)
            or self.kernel.why_fallback(*arguments)
            or (self._chooses and self.kernel.no_gain(*arguments))
        )
        if counting:
            self.count(fallback(reason) if reason else SERVED, module)
        return bool(reason)

    #: The old name.
    declines = falls_back

    def why_fallback(self, *tensors: object) -> str | None:
        """Why torch's state or these tensors send a call to the original, whatever the op."""
        return self._guard(self.kernel, tensors)

    def count(self, outcome: CallOutcome, module: nn.Module | None = None) -> None:
        """Count a call, where calls are counted; in a compiled graph when it is traced."""
        if not counting:
            return
        if self._compiling():
            _count_traced(self._number, outcome.how, outcome.reason)
            return
        for counter in self._counters_of(module):
            counter[outcome] += 1

    def _counters_of(self, module: nn.Module | None) -> Counters:
        if not self.modules:
            return self.counters
        if id(module) not in self.modules:
            held = {id(one): one for each in self.modules.values() for one in each}
            return [*self.counters, *held.values()]
        return [*self.counters, *self.modules[id(module)]]

    def _replaced(self, module: nn.Module | None) -> str | None:
        """The function that the fused code would ignore, as somebody has replaced it, if any."""
        if self._compiling():
            return None
        for scope, name, value in self.swallowed:
            now = getattr(module, name, None) if scope is None else scope.get(name)
            if getattr(now, "__func__", now) is not value and (
                scope is not None or module is not None
            ):
                return f"{name} was replaced by {_where(now)}"
        return None

    def release(self) -> None:
        """The last patch has let go of it."""
        self.active = False
        self.counters.clear()
        if self.modules:
            self.modules.clear()
        if self.on_release is not None:
            self.on_release()


_numbers = itertools.count()
_sites: WeakValueDictionary[int, Site] = WeakValueDictionary()


def _count_traced(number: int, how: How, reason: str) -> bool:
    """Count a call of the site of that number, whosever it is.

    torch.compile calls it while it traces: a counter inside of a graph would be one of its guards.
    """
    for counter in _sites[number]._counters_of(None):
        counter[CallOutcome(how, reason)] += 1
    return True


# As torch.compiler.assume_constant_result does.
_count_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _where(value: object) -> str:
    module = getattr(value, "__module__", None) or type(value).__module__
    return f"{module}'s"

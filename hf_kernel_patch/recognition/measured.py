"""Sites whose calls a measurement may leave to the original: those of ``include="measured"``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from hf_kernel_patch import devices
from hf_kernel_patch.kernels import Kernel
from hf_kernel_patch.recognition import site as sites
from hf_kernel_patch.recognition.outcome import SERVED, fallback
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    from torch import nn

#: Why a kernel that "auto" does not take serves nothing where nothing is measured.
NOT_TRIED = "measured: auto leaves it out, and it was not tried here"


class Measure(Protocol):
    """What a site knows of the measurement that a patch makes."""

    #: Whether it is to be told of calls that kernels serve.
    noting: bool

    def why_out(
        self, op: str, module: nn.Module | None, arguments: tuple[object, ...]
    ) -> str | None:
        """Why the original is to serve a call now, or None."""

    def served(self, op: str) -> None:
        """A kernel serves the call that was asked about last in this thread."""

    def sees(self, module: nn.Module) -> None:
        """A module calls a function, which knows nothing of the module."""

    def decodes(self, model: nn.Module) -> None:
        """A model decodes a token."""


class MeasuredSite(Site):
    """A site that asks a measurement first.

    Under torch.compile it does not: then it serves what "auto" would, and nothing is compiled anew.
    """

    __slots__ = ("_op", "_tried", "measures")

    def __init__(
        self,
        kernel: Kernel,
        original: Callable[..., Any] | None,
        explicit: bool,
        options: Mapping[str, object] | None = None,
        alone: bool = False,
    ):
        super().__init__(kernel, original, explicit, options, alone)
        #: Of patches of one model the id of each module, of others None -> who measures.
        self.measures: dict[int | None, Measure] = {}
        self._op = kernel.op or kernel.kernel_id
        self._tried = None if devices.current() in kernel.default_on else NOT_TRIED

    def falls_back(
        self, *arguments: object, unless: str | None = None, module: nn.Module | None = None
    ) -> bool:
        """As of any site; whoever measures may leave the call out.

        It is asked after the guard, so of plain tensors alone.
        """
        if not self.in_force(module):
            return True
        reason = (
            unless
            or (self.swallowed and self._replaced(module))
            or self._guard(self.kernel, arguments)
        )
        measure = None
        if not reason:
            if not self._compiling() and (measure := self.measure_of(module)) is not None:
                reason = measure.why_out(self._op, module, arguments)
            else:
                reason = self._tried
            reason = reason or self.kernel.why_fallback(*arguments)
            if not reason and self._chooses:
                reason = self.kernel.no_gain(*arguments)
        if sites.counting:
            self.count(fallback(reason) if reason else SERVED, module)
        if not reason and measure is not None and measure.noting:
            measure.served(self._op)
        return bool(reason)

    declines = falls_back

    def measure_of(self, module: nn.Module | None) -> Measure | None:
        """Who measures calls of a module; of a function's that knows none, what called it last."""
        measures = self.measures
        if (measure := measures.get(None if self.modules is None else id(module))) is not None:
            return measure
        return getattr(_thread, "measure", None) if module is None and measures else None

    def calls(self, module: nn.Module) -> None:
        """A module, which ``measure_of`` knows, is about to call a function that knows none."""
        if not self._compiling() and (measure := self.measure_of(module)) is not None:
            _thread.measure = measure
            measure.sees(module)

    def release(self) -> None:
        self.measures.clear()
        super().release()


class MeasuredDecoding(MeasuredSite):
    """Of a whole model that decodes a token, which is as "auto" has it: it ends a step before."""

    __slots__ = ()

    def in_force(self, module: nn.Module | None = None) -> bool:
        """As of any site."""
        answer = super().in_force(module)
        if answer and module is not None and not self._compiling():
            measure = self.measure_of(module)
            if measure is not None:
                measure.decodes(module)
        return answer


def site_class(kernel: Kernel, measured: bool) -> type[Site]:
    """The class of sites for a request."""
    if not measured:
        return Site
    return MeasuredDecoding if kernel.op == "decode_attention" else MeasuredSite


_thread = threading.local()

"""One replaced place at call time: who serves it, what was there, and what its calls met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from hf_kernel_patch.registry import Kernel

SERVED = "served"
#: What a call is counted as that replayed CUDA graphs.
REPLAYED = "served by CUDA graphs"
#: Whether calls are counted; set by ``hf_kernel_patch.count_calls``.
counting = False
#: Whether decoder layers decode from CUDA graphs; set by ``hf_kernel_patch.capture_decoding``.
capturing = True


class Site:
    """What a replacement knows: the op to run, the original to hand calls back to, and a counter.

    ``options`` are the kernel's own, with what was asked for in place of their defaults.
    ``active`` counts the patches that hold the replacement in force. At zero it delegates to the
    original, since somebody may have captured it while it was.
    """

    __slots__ = (
        "_guard",
        "active",
        "counters",
        "explicit",
        "kernel",
        "name",
        "on_release",
        "op",
        "options",
        "original",
        "replacement",
    )

    def __init__(
        self,
        name: str,
        kernel: Kernel,
        original: Any,
        explicit: bool,
        options: Mapping[str, Any] | None = None,
    ):
        self.name = name
        self.kernel = kernel
        self.op = kernel.load()
        self.original = original
        self.explicit = explicit
        self.options = {**kernel.options, **(options or {})}
        self.replacement: Any = None
        self.active = 0
        #: What to do when the last patch lets go of the site.
        self.on_release: Callable[[], None] | None = None
        #: One for each patch that holds the site, so that each counts its own calls.
        self.counters: list[Counter[str]] = []
        from hf_kernel_patch.ops.guard import why_not

        self._guard = why_not

    def declines(self, *arguments: Any, unless: str | None = None) -> bool:
        """Whether this call goes to the original; ``arguments`` are the op's.

        ``unless`` is a reason that the form has found already.
        """
        if not self.active:
            return True
        reason = unless or self._guard(self.kernel, arguments) or self.kernel.refuse(*arguments)
        self.count(reason or SERVED)
        return reason is not None

    def why_not(self, *tensors: Any) -> str | None:
        """Why torch's state or these tensors send a call to the original, whatever the op."""
        return self._guard(self.kernel, tensors)

    def count(self, outcome: str) -> None:
        """Count a call, where calls are counted."""
        if counting:
            for counter in self.counters:
                counter[outcome] += 1

    def release(self) -> None:
        """One patch less holds the replacement in force."""
        self.active = max(0, self.active - 1)
        if not self.active and self.on_release is not None:
            self.on_release()


def site_of(value: Any) -> Site | None:
    """The site whose replacement the value is; a wrapper that copied its attributes is not it."""
    site = getattr(value, "__hf_kernel_patch__", None)
    return site if isinstance(site, Site) and site.replacement is value else None

"""Fused kernels for Hugging Face models, put in place of the originals and taken back exactly."""

import warnings
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import settings
from hf_kernel_patch.api import (
    apply_default_kernels,
    apply_kernel,
    capture_decoding,
    count_calls,
    get_available_kernels,
    get_default_kernels,
    patch_transformers,
    status,
    unpatch,
)
from hf_kernel_patch.benchmarking import Benchmark, bench
from hf_kernel_patch.bisecting import Bisection, bisect
from hf_kernel_patch.errors import (
    ForeignPatchError,
    KernelPatchError,
    KernelPatchWarning,
    KernelUnavailableError,
    warn,
)
from hf_kernel_patch.kernels import BaseKernel, register_kernel
from hf_kernel_patch.models import Architecture, register_model
from hf_kernel_patch.patching import log
from hf_kernel_patch.patching.block import patched
from hf_kernel_patch.patching.choosing import load_kernel_config
from hf_kernel_patch.patching.report import PatchReport, Row
from hf_kernel_patch.recognition import Leaf, Rule, experts_interface
from hf_kernel_patch.recognition import register as register_code
from hf_kernel_patch.verifying import Verification, verify
from hf_kernel_patch.version import __version__

if TYPE_CHECKING:
    from hf_kernel_patch.integrations.auto import AutoModelForCausalLM
    from hf_kernel_patch.integrations.trainer import KernelPatchCallback

__all__ = [
    "Architecture",
    "AutoModelForCausalLM",
    "BaseKernel",
    "Benchmark",
    "Bisection",
    "ForeignPatchError",
    "KernelPatchCallback",
    "KernelPatchError",
    "KernelPatchWarning",
    "KernelUnavailableError",
    "Leaf",
    "PatchReport",
    "Row",
    "Rule",
    "Verification",
    "__version__",
    "apply_default_kernels",
    "apply_kernel",
    "bench",
    "bisect",
    "capture_decoding",
    "count_calls",
    "get_available_kernels",
    "get_default_kernels",
    "load_kernel_config",
    "patch_transformers",
    "patched",
    "register_code",
    "register_kernel",
    "register_model",
    "status",
    "unpatch",
    "verify",
]

#: Names of the last release -> what took their place.
_OLD = {"Form": "Leaf", "register_form": "register_code"}

#: Names that are imported when somebody asks for them -> where they are.
_NEEDING_TRANSFORMERS = {
    "AutoModelForCausalLM": "hf_kernel_patch.integrations.auto",
    "KernelPatchCallback": "hf_kernel_patch.integrations.trainer",
}

experts_interface.register()
if not settings.in_command_line():  # which tells of a bad variable without a traceback
    for text in settings.unknown_variables():
        warn(text)
    if (level := settings.log_level()) is not None:
        log.show(level)
    count_calls(settings.flag("COUNT"))
    capture_decoding(settings.flag("CAPTURE", True))
    if settings.requested_by_environment():
        patch_transformers()


if not TYPE_CHECKING:  # to a type checker a name that is not above is an error

    def __getattr__(name: str) -> Any:
        if name in _NEEDING_TRANSFORMERS:
            return resolve_name(f"{_NEEDING_TRANSFORMERS[name]}:{name}")
        if name in _OLD:
            warnings.warn(f"{name} is old: use {_OLD[name]}", DeprecationWarning, stacklevel=2)
            return globals()[_OLD[name]]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

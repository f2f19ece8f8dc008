"""Which of the op's arguments a kernel takes that somebody else may have written."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hf_kernel_patch.ops.rms_norm import RMS_NORM
from hf_kernel_patch.recognition.site import Site


def missing(site: Site, name: str) -> str | None:
    """Why a site's kernel cannot serve norms that need this argument of the op, or None.

    A kernel that takes ``group_size`` takes a norm without a weight, too.
    """
    count = 1 + list(RMS_NORM.parameters).index(name)
    takes = _binds(site.kernel.refuse, count) and _binds(site.op, count)
    # What only takes any number of arguments may have been written when there were fewer.
    if takes and (name == "gate" or _names(site.op, name)):
        return None
    return f"{site.kernel.kernel_id} takes no {name}"


def _binds(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # it does not say what it takes
        return True
    return True


def _names(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except ValueError:
        return False

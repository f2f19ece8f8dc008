"""Which of the op's arguments a site's kernel takes."""

from __future__ import annotations

from hf_kernel_patch.ops.rms_norm import RMS_NORM
from hf_kernel_patch.recognition.leaves.signature import names, takes
from hf_kernel_patch.recognition.site import Site


def missing(site: Site, argument: str) -> str | None:
    """Why a site's kernel cannot serve norms that need this optional argument, or None.

    A kernel that takes ``group_size`` also takes None as the weight.
    """
    count = 1 + list(RMS_NORM.parameters).index(argument)
    enough = takes(site.kernel.why_fallback, count) and takes(site.op, count)
    # The name is asked for too: with *args a function takes any number of arguments, and may have
    # been written when the op had fewer. ``gate`` was among them from the start.
    if enough and (argument == "gate" or names(site.op, argument)):
        return None
    return f"{site.kernel.kernel_id} takes no {argument}"

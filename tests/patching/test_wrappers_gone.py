"""A wrapper that somebody put around our function, and took away, is not blamed later."""

from __future__ import annotations

from tests.support.probes import run_python

#: In a Python of its own, for layers of other tests' models may own a forward.
PROGRAM = """
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils.deprecation import deprecate_kwarg

import hf_kernel_patch
from hf_kernel_patch import registry

KERNEL = "torch_fused_add_rmsnorm"
original = LlamaDecoderLayer.forward
with hf_kernel_patch.patched(KERNEL, models="llama"):
    ours = LlamaDecoderLayer.forward
    LlamaDecoderLayer.forward = deprecate_kwarg("formerly", version="99.0.0")(ours)
    with hf_kernel_patch.patched(KERNEL, models="llama") as report:
        assert [row.outcome for row in report] == ["patched"], report  # around the wrapper
    LlamaDecoderLayer.forward = ours
assert LlamaDecoderLayer.forward is original
del ours
# For this one another function is made.
another = type("Another", (registry.kernels()[KERNEL],), {"kernel_id": "another"})
registry.kernels()["another"] = another
with hf_kernel_patch.patched("another", models="llama", strict=True) as report:
    assert [row.outcome for row in report] == ["patched"], report
"""


def test_a_wrapper_that_is_gone_holds_nothing() -> None:
    done = run_python(PROGRAM)
    assert done.returncode == 0, done.stderr

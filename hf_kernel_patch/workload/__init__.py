"""Models to try kernels on, from a folder or with random weights, and batches for them."""

from hf_kernel_patch.workload.batches import as_batch, batch_of, device_of
from hf_kernel_patch.workload.loading import load
from hf_kernel_patch.workload.seeds import seeded

__all__ = ["as_batch", "batch_of", "device_of", "load", "seeded"]

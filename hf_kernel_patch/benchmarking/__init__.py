"""What each op gains in a model: speed and memory of training steps and decoding, in turns."""

from hf_kernel_patch.benchmarking.public import bench
from hf_kernel_patch.benchmarking.result import Benchmark

__all__ = ["Benchmark", "bench"]

"""Launching Triton kernels at little host time, and what they have to know of device and strides.

Imports no triton: a kernel is whatever ``triton.jit`` made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

#: launch(programs, tensors, numbers); the kernel's arguments are tensors, numbers, static values.
Launch = Callable[[int, Sequence[torch.Tensor], tuple[float | None, ...]], None]


#: Whether launches of now may start before the kernel in front of them has ended.
_early = False


@contextmanager
def early_launches() -> Iterator[None]:
    """Launch kernels that can wait for the one before while that one still runs.

    For what is captured in graphs: on its own such a launch costs the host more.
    """
    global _early
    before, _early = _early, True
    try:
        yield
    finally:
        _early = before


def launcher(
    kernel: Any,
    static: tuple[object, ...],
    num_warps: int,
    num_stages: int = 1,
    waits: bool = False,
) -> Launch:
    """The cheapest safe way to launch ``kernel`` again and again on tensors of the same dtypes.

    Args:
        kernel: its parameters are pointers, then numbers, then what is the same at every launch.
            The numbers have to be annotated with their type (``tl.int64``, ``tl.float32``) and
            named in ``do_not_specialize``, so that no value asks for another compiled kernel.
            A pointer that a kernel may do without is None among the numbers, always or never.
        static: the last arguments of every launch, constexprs as a rule.
        num_warps, num_stages: as Triton takes them.
        waits: whether its last argument, after ``static``, is EARLY: whether it has to wait for the
            kernel before (see ``triton_early.py``).

    The first launch on a device goes through Triton, which compiles; later ones call what was
    compiled directly. As that code takes pointers for multiples of 16, a launch with one that is
    not goes through Triton too. The launch is on the tensors' device, whichever is current.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    ready: dict[int, tuple[Any, tuple[object, ...]] | None] = {}
    static_early = (*static, True)
    if waits:
        static = (*static, False)

    def launch(
        programs: int, tensors: Sequence[torch.Tensor], numbers: tuple[float | None, ...]
    ) -> None:
        device = tensors[0].get_device()
        if device != _current_device() and device >= 0 and _is_elsewhere(tensors[0]):
            with torch.get_device_module(tensors[0].device).device(device):
                return launch(programs, tensors, numbers)
        if _early and waits and _has_early_launch(tensors[0].device):
            kernel[(programs,)](*tensors, *numbers, *static_early, **options, launch_pdl=True)
            return None
        pointers = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        aligned = bits % 16 == 0
        if aligned and (direct := ready.get(device)) is not None:
            call, head = direct
            try:
                call(programs, 1, 1, _stream(device), *head, *pointers, *numbers, *static)
                return None
            except TypeError:  # not the launcher that _direct knows
                ready[device] = None
        compiled = kernel[(programs,)](*tensors, *numbers, *static, **options)
        if aligned and device not in ready:
            ready[device] = _direct(compiled) if tensors[0].is_cuda else None
        return None

    return launch


def _has_early_launch(device: torch.device) -> bool:
    from hf_kernel_patch.ops._shared.triton_early import has_early_launch  # which imports triton

    return has_early_launch(device)


_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def _is_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether another device than the tensor's is the current one of its type."""
    return bool(tensor.get_device() != torch.get_device_module(tensor.device).current_device())


#: Attributes of Triton's CUDA launcher object -> what its ``launch`` takes for the two scratch
#: buffers; 3.4 has one, 3.5 and 3.6 have two. Others are called as Triton calls them.
_BARE = {"num_ctas", "launch", "launch_cooperative_grid", "launch_pdl"}
_BARE |= {"global_scratch_size", "global_scratch_align"}
_SCRATCH = {
    frozenset(_BARE): (None,),
    frozenset(_BARE | {"profile_scratch_size", "profile_scratch_align"}): (None, None),
}


def _direct(compiled: Any) -> tuple[Any, tuple[object, ...]] | None:
    """(callable, its arguments between the stream and the kernel's own) of a compiled kernel.

    None where this Triton's compiled kernels are not as they are from 3.4 to 3.7.
    """
    run = getattr(compiled, "run", None)
    function = getattr(compiled, "function", None)
    metadata = getattr(compiled, "packed_metadata", None)
    if not callable(run) or function is None or metadata is None:
        return None
    head = (metadata, None, None, None)  # then launch metadata and hooks, as where nobody profiles
    names = vars(run) if type(run).__name__ == "CudaLauncher" else {}
    scratch = _SCRATCH.get(frozenset(names))
    if scratch is None or names["global_scratch_size"] or names.get("profile_scratch_size"):
        return run, (function, *head)
    return run.launch, (function, run.launch_cooperative_grid, run.launch_pdl, *scratch, *head)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


class Strides(NamedTuple):
    """How to walk the rows of tensors: row r starts at (r // inner) * outer + (r % inner) * step.

    The strides are in units of ``unit`` elements: a number that Triton knows when it compiles, so
    that it can tell whether rows start at multiples of 16 bytes.
    """

    unit: int
    #: inner, then outer and step of each tensor.
    numbers: tuple[int, ...]


def strides_of(out: torch.Tensor, *tensors: torch.Tensor) -> Strides | None:
    """How to walk the rows (last dimension) of tensors of one shape as they lie in ``out``.

    ``out`` has to be dense, in any order of its dimensions. None where more than two levels of
    strides are needed or some last dimension is not contiguous.
    """
    return _strides_of(out.shape, out.stride(), *(tensor.stride() for tensor in tensors))


@lru_cache(maxsize=4096)
def _strides_of(shape: tuple[int, ...], *strides: tuple[int, ...]) -> Strides | None:
    if shape[-1] > 1 and any(stride[-1] != 1 for stride in strides):
        return None
    order = [dim for dim in range(len(shape) - 1) if shape[dim] > 1]
    levels: list[tuple[int, ...]] = []  # size, then the stride of out and of each tensor
    for dim in sorted(order, key=lambda dim: -strides[0][dim]):
        level = (shape[dim], *(stride[dim] for stride in strides))
        if levels and all(a == b * shape[dim] for a, b in zip(levels[-1][1:], level[1:])):
            level = (levels.pop()[0] * shape[dim], *level[1:])
        levels.append(level)
    dense = shape[-1]
    for level in reversed(levels):
        if level[1] != dense:
            return None
        dense *= level[0]
    if len(levels) > 2:
        return None
    inner, steps = (levels[1][0], levels[1][2:]) if len(levels) == 2 else (1, (0,) * len(strides))
    outers = levels[0][2:] if levels else (0,) * len(strides)
    flat = [stride for pair in zip(outers, steps) for stride in pair]
    unit = 8 if all(stride % 8 == 0 for stride in flat) else 1
    return Strides(unit, (inner, *(stride // unit for stride in flat)))


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a device has; a few on a CPU, where kernels are interpreted."""
    if device.type == "cpu":
        return 3
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 64))


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type == "cpu":
        return 1 << 16
    properties = torch.get_device_module(device).get_device_properties(device)
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    return max(int(getattr(properties, name, 48 << 10)) for name in names)


def programs_for(blocks: int, most: int) -> int:
    """How many looping programs, at most ``most``, so that all take about as many blocks."""
    return cdiv(blocks, cdiv(blocks, most)) if blocks else 0

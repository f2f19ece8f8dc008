"""The launcher, against the Triton versions' launchers, and how rows are walked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hf_kernel_patch.ops._shared import launch

SCRATCH = {"global_scratch_size": 0, "global_scratch_align": 1}
PROFILE = {"profile_scratch_size": 0, "profile_scratch_align": 1}
BARE = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
#: Attributes of the launcher object of each version, and whether it may be bypassed.
VERSIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "3.4": ({**BARE, **SCRATCH}, True),
    "3.6": ({**BARE, **SCRATCH, **PROFILE}, True),
    "3.7": ({**BARE, **SCRATCH, **PROFILE, "arg_annotations": [], "kernel_signature": b""}, False),
    "3.6 with scratch": ({**BARE, **SCRATCH, **PROFILE, "global_scratch_size": 8}, False),
    "3.6 profiling": ({**BARE, **SCRATCH, **PROFILE, "profile_scratch_size": 8}, False),
}


class CudaLauncher:
    """As Triton's: calls what it holds, with what that takes besides."""

    def __init__(self, attributes: dict[str, Any], calls: list[Any]):
        vars(self).update(attributes, launch=lambda *arguments: calls.append(arguments))
        self.__class__ = type("CudaLauncher", (CudaLauncher,), {"calls": calls})

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)  # type: ignore[attr-defined]


class Compiled:
    """A compiled kernel."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, run: Any):
        self.run = run


class Kernel:
    """A kernel that remembers its launches through Triton."""

    def __init__(self, compiled: Any):
        self.compiled, self.launches = compiled, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: int) -> Any:
            self.launches.append((grid, arguments, options))
            return self.compiled

        return run


class OnGPU:
    """As much of a CUDA tensor as the launcher looks at."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, pointer: int):
        self.pointer = pointer

    def data_ptr(self) -> int:
        return self.pointer

    def get_device(self) -> int:
        return 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_current_device", lambda: 0)
    monkeypatch.setattr(launch, "_stream", lambda device: f"stream of {device}")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("version", VERSIONS)
def test_from_the_second_launch_on_triton_is_bypassed(version: str) -> None:
    attributes, bare = VERSIONS[version]
    calls: list[Any] = []
    kernel = Kernel(Compiled(CudaLauncher(attributes, calls)))
    launching = launch.launcher(kernel, ("static",), 4, 2)
    tensors: Any = OnGPU(16), OnGPU(32)
    launching(5, tensors, (7,))
    assert kernel.launches == [((5,), (*tensors, 7, "static"), {"num_warps": 4, "num_stages": 2})]
    assert not calls
    launching(6, tensors, (8,))
    assert len(kernel.launches) == 1
    between = [False, False, None, *([None] if "profile_scratch_size" in attributes else [])]
    head = ("function", *(between if bare else ()), "metadata", None, None, None)
    assert calls == [(6, 1, 1, "stream of 0", *head, 16, 32, 8, "static")]


@pytest.mark.usefixtures("gpu")
def test_pointers_that_are_not_multiples_of_16_go_through_triton() -> None:
    calls: list[Any] = []
    kernel = Kernel(Compiled(CudaLauncher(VERSIONS["3.6"][0], calls)))
    launching = launch.launcher(kernel, (), 4)
    for pointers in ((18, 32), (16, 32), (16, 40), (16, 32)):
        launching(1, [OnGPU(pointer) for pointer in pointers], ())  # type: ignore[misc]
    assert (len(kernel.launches), len(calls)) == (3, 1)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "compiled",
    [None, object(), Compiled(None), Compiled(lambda *arguments: int(arguments))],  # type: ignore
    ids=["nothing", "no kernel", "no launcher", "other arguments"],
)
def test_another_triton_launches_as_it_likes(compiled: Any) -> None:
    kernel = Kernel(compiled)
    launching = launch.launcher(kernel, (), 4)
    for _ in range(3):
        launching(1, [OnGPU(16)], ())  # type: ignore[list-item]
    assert len(kernel.launches) == 3


def test_tensors_of_a_cpu_go_through_triton() -> None:
    calls: list[Any] = []
    kernel = Kernel(Compiled(CudaLauncher(VERSIONS["3.6"][0], calls)))
    launching = launch.launcher(kernel, (), 4)
    for _ in range(2):
        launching(1, [torch.empty(1)], ())
    assert (len(kernel.launches), len(calls)) == (2, 0)


def layouts() -> list[tuple[str, torch.Tensor]]:
    """Views of tensors, by name."""
    x = torch.empty(6, 10, 4, 16)
    found = [(f"order {order}", x.permute(*order, 3)) for order in itertools.permutations(range(3))]
    found += [(f"sliced {i}", x[tuple([slice(None)] * i + [slice(1, 3)])]) for i in range(3)]
    found += [("one row", x[:1, :1, :1]), ("half", x[..., 8:]), ("heads", x[:, :, 1:3, :8])]
    found += [("odd", torch.empty(3, 7, 5)[..., 1:]), ("flat", x[0, 0, 0]), ("rows", x[0, 0])]
    return found


@pytest.mark.parametrize(("name", "x"), layouts(), ids=lambda value: value * isinstance(value, str))
@pytest.mark.parametrize("like_x", [True, False])
def test_rows_are_walked_in_the_order_of_the_output(
    name: str, x: torch.Tensor, like_x: bool
) -> None:
    out = torch.empty_like(x) if like_x else torch.empty(x.shape)
    walk = launch.strides_of(out, x, out)
    if walk is None:  # three levels
        assert not like_x
        return
    inner, outer, step, *dense = walk.numbers
    rows = x.numel() // x.shape[-1]
    width = x.shape[-1]
    found = [walk.unit * ((row // inner) * outer + (row % inner) * step) for row in range(rows)]
    offsets = torch.arange(x.untyped_storage().nbytes() // 4)
    starts = offsets.as_strided(x.shape, x.stride())[..., 0].flatten()
    order = torch.arange(out.numel()).as_strided(out.shape, out.stride())[..., 0].flatten()
    assert torch.equal(torch.tensor(found), starts[order.argsort()])
    assert dense[0] * walk.unit in (0, width, width * inner)


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(4, 16)[:, ::2],
        torch.empty(6, 10, 4, 16)[::2, ::2, ::2],
        torch.empty(16, 4).t(),
    ],
    ids=["last dimension", "three levels", "transposed"],
)
def test_rows_that_cannot_be_walked(x: torch.Tensor) -> None:
    assert launch.strides_of(torch.empty_like(x), x) is None


def test_programs_take_about_as_many_blocks_each() -> None:
    for blocks in (0, 1, 7, 131, 132, 133, 16384):
        for most in (1, 132, 528):
            programs = launch.programs_for(blocks, most)
            assert programs <= min(most, blocks)
            if blocks:
                assert -(-blocks // programs) == -(-blocks // min(most, blocks))

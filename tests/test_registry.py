"""Kernels: registering, finding, choosing, and the reasons for not having one."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import BaseKernel, KernelUnavailableError, registry, settings
from hf_kernel_patch.ops.rms_norm import TorchFusedRMSNorm
from tests.support.probes import MOE, NORM, ROPE, SWIGLU, watched_kernel

LOSS = "torch_fused_linear_cross_entropy"


@pytest.fixture(autouse=True)
def kernels_as_before() -> Iterator[None]:
    before = dict(registry.kernels())
    yield
    registry.kernels().clear()
    registry.kernels().update(before)


def test_the_kernels_of_the_ops_folder_are_found() -> None:
    ops = {"rms_norm": NORM, "rope": ROPE, "swiglu": SWIGLU, "moe": MOE}
    for op, kernel_id in {**ops, "linear_cross_entropy": LOSS}.items():
        kernel = registry.kernels()[kernel_id]
        assert (kernel.op, kernel.kernel_id, kernel.backend) == (op, kernel_id, "torch")
        assert callable(kernel.load())
        assert kernel_id in hf_kernel_patch.get_available_kernels()
    assert registry.ops() >= {*ops, "linear_cross_entropy"}


def test_defaults_are_available_and_leave_the_loss_out() -> None:
    defaults = hf_kernel_patch.get_default_kernels()
    assert set(defaults) <= set(hf_kernel_patch.get_available_kernels())
    assert LOSS not in defaults
    if not torch.accelerator.is_available():
        on_cpu = {name for name, k in registry.kernels().items() if "cpu" in k.default_on}
        assert set(defaults) == on_cpu >= {NORM, ROPE}


def test_register_kernel_gives_the_class_back_and_takes_it_again() -> None:
    def define() -> Any:
        @hf_kernel_patch.register_kernel
        class Own(BaseKernel):
            kernel_id = "own_kernel"

        return Own

    first, second = define(), define()
    assert registry.kernels()["own_kernel"] is second is not first


@pytest.mark.parametrize("thing", [3, BaseKernel(), int, lambda model: model])
def test_register_kernel_refuses_what_is_no_kernel(thing: Any) -> None:
    with pytest.raises(TypeError, match="subclass of BaseKernel"):
        hf_kernel_patch.register_kernel(thing)


@pytest.mark.parametrize("kernel_id", ["", "one,two"])
def test_register_kernel_refuses_an_id_that_include_could_not_name(kernel_id: str) -> None:
    with pytest.raises(ValueError, match="Own needs a kernel_id"):
        hf_kernel_patch.register_kernel(type("Own", (BaseKernel,), {"kernel_id": kernel_id}))


def test_register_kernel_refuses_an_id_that_another_class_holds() -> None:
    with pytest.raises(ValueError, match=rf"'{NORM}' is taken by hf_kernel_patch\.ops"):
        hf_kernel_patch.register_kernel(type("Own", (BaseKernel,), {"kernel_id": NORM}))
    assert registry.kernels()[NORM].__module__ == "hf_kernel_patch.ops.rms_norm"


def test_the_reference_documents_attribute_names_work() -> None:
    class DeviceType(Enum):
        NPU = "npu"

    @hf_kernel_patch.register_kernel
    class Own(BaseKernel):
        _kernel_id = "own_kernel"
        _device = DeviceType.NPU

    assert (Own.kernel_id, Own.device) == ("own_kernel", "npu")
    assert registry.kernels()["own_kernel"] is Own


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"device": "npu"}, "npu"),
        ({"device": "mtia"}, "no mtia device"),
        ({"requires": ("torch", "no_such_package")}, "needs the package no_such_package"),
        ({"check_device": classmethod(lambda cls: "the chip is too old")}, "the chip is too old"),
        ({"check_deps": lambda: "a static reason"}, "a static reason"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused_with_the_reason(
    members: dict[str, Any], reason: str
) -> None:
    with watched_kernel(**members):
        assert "own_rmsnorm" not in hf_kernel_patch.get_available_kernels()
        for include in ("own_rmsnorm", ("rope", "own_rmsnorm")):
            with pytest.raises(KernelUnavailableError, match=f"'own_rmsnorm' cannot.*{reason}"):
                hf_kernel_patch.patch_transformers(include)
            with pytest.raises(KernelUnavailableError, match=reason):
                hf_kernel_patch.patched(include)


def test_checks_may_answer_true_and_false() -> None:
    @hf_kernel_patch.register_kernel
    class Own(BaseKernel):
        kernel_id = "own_kernel"
        op = "own_op"

        @classmethod
        def check_device(cls) -> Any:
            return False

    with pytest.raises(KernelUnavailableError, match=r"Own\.check_device\(\) says no"):
        hf_kernel_patch.patch_transformers("own_kernel")
    yes = classmethod(lambda cls: True)
    with watched_kernel(check_device=yes, check_deps=yes):
        assert "own_rmsnorm" in hf_kernel_patch.get_available_kernels()


def test_auto_leaves_an_unavailable_default_out() -> None:
    everywhere = ("cpu", "cuda", "npu", "xpu", "mps")
    with watched_kernel(op="own_op", default_on=everywhere, requires=("no_such_package",)):
        assert "own_rmsnorm" not in hf_kernel_patch.get_default_kernels()
    with watched_kernel(op="own_op", default_on=everywhere):
        assert "own_rmsnorm" in hf_kernel_patch.get_default_kernels()


def test_an_op_name_takes_a_kernel_that_can_run() -> None:
    with watched_kernel(device="mtia"):
        chosen = registry.select(("rms_norm",), backend="torch")["rms_norm"]
        assert chosen.kernel_id == NORM
    with (
        watched_kernel("one", op="own_op", device="mtia"),
        watched_kernel("two", op="own_op", requires=("no_such_package",)),
        pytest.raises(KernelUnavailableError, match=r"'own_op'.*one: no mtia.*two: needs the pack"),
    ):
        registry.select(("own_op",))


def test_two_kernels_of_one_op_have_to_be_told_apart() -> None:
    with watched_kernel():
        with pytest.raises(ValueError, match=f"'{NORM}' and 'own_rmsnorm' both serve rms_norm"):
            hf_kernel_patch.patch_transformers((NORM, "own_rmsnorm"))
        assert list(registry.select((NORM, ROPE, NORM))) == ["rms_norm", "rope"]


def test_exclude_takes_ids_and_ops() -> None:
    everything = (NORM, ROPE, SWIGLU)
    assert set(registry.select(everything, (ROPE, "swiglu"))) == {"rms_norm"}
    assert registry.select(everything, ("rms_norm", "rope", "swiglu")) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": "torch_fused_rmsnrom"}, f"'torch_fused_rmsnrom'.*; did you mean '{NORM}'"),
        ({"include": ["rmsnorm"]}, "unknown kernel id or op 'rmsnorm'.*; did you mean 'rms_norm'"),
        ({"exclude": "ropee"}, "unknown kernel id or op 'ropee'.*; did you mean 'rope'"),
        ({"include": None, "exclude": "ropee"}, "unknown kernel id or op 'ropee'"),
        ({"models": ["lama"]}, "unknown model 'lama'.*; did you mean 'llama'"),
        ({"models": "llama,Qwen-3"}, "unknown model 'Qwen-3'.*; did you mean 'qwen3'"),
        ({"backend": "tritn"}, "unknown backend 'tritn'.*; did you mean 'triton'"),
        (
            {"include": "xxxxxxxx"},
            "unknown kernel id or op 'xxxxxxxx'.* Known: .*moe, .*rms_norm, ",
        ),
    ],
)
def test_an_unknown_name_raises_with_the_near_matches(
    arguments: dict[str, Any], message: str
) -> None:
    for call in (hf_kernel_patch.patch_transformers, hf_kernel_patch.patched):
        with pytest.raises(ValueError, match=message):
            call(**arguments)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        pytest.param("npu", "npu", id="npu"),
        pytest.param(
            "triton",
            "triton|cuda",
            id="triton",
            marks=pytest.mark.skipif(
                torch.accelerator.is_available(), reason="an accelerator that Triton may serve"
            ),
        ),
    ],
)
@pytest.mark.parametrize("include", ["auto", "rms_norm"])
def test_a_backend_that_cannot_run_here_raises_with_the_reason(
    backend: str, reason: str, include: str
) -> None:
    with pytest.raises(KernelUnavailableError, match=f"'{backend}' cannot run here.*({reason})"):
        hf_kernel_patch.patch_transformers(include, backend=backend)


def test_backend_chooses_among_the_kernels_of_an_op() -> None:
    with watched_kernel(backend="own"):
        assert registry.select(("rms_norm",), backend="torch")["rms_norm"].kernel_id == NORM
        assert registry.select(("rms_norm",), backend="own")["rms_norm"].kernel_id == "own_rmsnorm"
        with pytest.raises(KernelUnavailableError, match=rf"{ROPE}: its backend is 'torch'"):
            registry.select(("rope",), backend="own")
    with pytest.raises(ValueError, match="unknown backend 'own'"):
        registry.select(("rms_norm",), backend="own")


def test_a_function_given_by_name_is_imported_at_first_use() -> None:
    with watched_kernel(function="no_such_package.ops:rms_norm") as watched:
        kernel = registry.kernels()[watched.kernel_id]
        assert registry.unavailable(kernel) is None
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            kernel.load()


GIVEN = {
    "linear_cross_entropy.exact=1": {"exact": True},
    f"{LOSS}.exact=no, {LOSS}.memory_mib=256": {"exact": False, "memory_mib": 256.0},
    "linear_cross_entropy.memory_mib=auto, linear_cross_entropy.z_loss=1e-4": {
        "memory_mib": None,
        "z_loss": 1e-4,
    },
    "cuda_fused_linear_cross_entropy.exact=1": {},  # another kernel's
}


@pytest.mark.parametrize("given", GIVEN)
def test_options_are_read_by_what_their_defaults_are(given: str) -> None:
    kernel = registry.kernels()[LOSS]
    options = settings.resolve(options=given).options
    assert registry.options_of(kernel, options) == GIVEN[given]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_crossentropy": {"exact": True}}, "did you mean 'linear_cross_entropy'"),
        ({"linear_cross_entropy": {"exakt": True}}, "did you mean 'exact'"),
        ({"linear_cross_entropy": {"exact": "perhaps"}}, "is true or false, not 'perhaps'"),
        ({"linear_cross_entropy": {"z_loss": "much"}}, "is a number, not 'much'"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_patched(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_kernel_patch.patch_transformers(LOSS, options=options)
    with pytest.raises(ValueError, match=message):
        hf_kernel_patch.patched(LOSS, options=options)


def test_the_old_name_of_why_fallback_warns_and_works() -> None:
    with pytest.warns(DeprecationWarning, match="call it why_fallback"):

        class Old(TorchFusedRMSNorm):
            @classmethod
            def refuse(cls, x: Any, *rest: Any) -> str | None:
                return "too long a row" if x.shape[-1] > 8 else super().refuse(x, *rest)

    short, long = torch.ones(2, 8), torch.ones(2, 9)
    assert Old.why_fallback(short, short[0], 1e-6) is None
    assert Old.why_fallback(long, long[0], 1e-6) == "too long a row"
    assert Old.why_fallback(short, long[0], 1e-6) == TorchFusedRMSNorm.refuse(short, long[0], 1e-6)
    assert TorchFusedRMSNorm.refuse(short, long[0], 1e-6) is not None

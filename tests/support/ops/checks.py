"""What every op's backends are held to: a table of cases in each test file, checked here.

A backend is a registered kernel of the op; one that cannot run here is skipped with its reason.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from hf_kernel_patch import registry
from tests.support.ops.inputs import BF16, F16, F32, F64, draw
from tests.support.tiny import error

SHORT = {F16: "fp16", BF16: "bf16", F32: "fp32"}
#: How far Hugging Face's own code may be from the float64 reference, by its narrowest dtype.
EAGER = {F32: 1e-5, F16: 6e-3, BF16: 5e-2}
#: An error of a backend is at most 1.1 + 5 / sqrt(n) times eager's plus FLOOR epsilons. n is the
#: size of the tensor or of the op's first argument: an error measured on n roundings is not known
#: any better. Eager's luck with a few numbers proves nothing: they may be off by FEW epsilons.
FLOOR, FEW = {F32: 1 / 2, F16: 1 / 64, BF16: 1 / 64}, 1 / 4


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: the test's id.
        op: the op; its reference has the same name.
        inputs: device -> (arguments, keyword arguments) of the op; the same at every call. What
            is not to get a gradient does not require one.
        original: Hugging Face's code for the same arguments.
        exact: whether a plain PyTorch backend gives the original's bits in the forward.
    """

    name: str
    op: str
    inputs: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]
    original: Callable[..., Any]
    exact: bool = False

    def reference(self, *arguments: Any, **options: Any) -> Any:
        module = importlib.import_module(f"hf_kernel_patch.ops.{self.op}.reference")
        return getattr(module, self.op)(*arguments, **options)

    def __str__(self) -> str:
        return self.name


@dataclass
class Outcome:
    """Outputs and gradients of one run; None for the gradient of an input that was not used."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None] = field(default_factory=list)

    def tensors(self) -> list[tuple[str, torch.Tensor | None]]:
        """By name, on the CPU."""
        named: list[tuple[str, torch.Tensor | None]] = []
        named += [(f"output {i}", out.detach().cpu()) for i, out in enumerate(self.outputs)]
        for i, grad in enumerate(self.gradients):
            named.append((f"gradient {i}", None if grad is None else grad.cpu()))
        return named


def backends(cases: Iterable[Case]) -> list[Any]:
    """Parameters (kernel, case) of every case with every registered kernel of its op."""
    return [
        pytest.param(kernel, case, id=f"{kernel.kernel_id}-{case}")
        for case in cases
        for kernel in registry.kernels().values()
        if kernel.op == case.op
    ]


def check_reference(case: Case) -> None:
    """The reference is what Hugging Face computes: outputs and gradients, in shape and value.

    In float32 the reference's own default arithmetic is compared, which is bit for bit that of an
    ``exact`` case; in half precision float64, as near as the dtype allows.
    """
    original = run(case.original, case.inputs("cpu"))
    upstream = _upstream(original)
    original = run(case.original, case.inputs("cpu"), upstream)
    same = run(case.reference, case.inputs("cpu"), upstream)
    narrowest = _narrowest(case.inputs("cpu"), same)
    truth = _truth(case, upstream)
    for (name, found), (_, here), (_, wide) in zip(
        original.tensors(), same.tensors(), truth.tensors(), strict=True
    ):
        if found is None or here is None:
            assert _nothing(found, here), name
            continue
        assert found.shape == here.shape, name
        assert found.dtype == here.dtype, name
        wide = torch.zeros_like(here) if wide is None else wide
        found, here, wide = _finite(found, found, here, wide)
        assert error(found, wide) <= EAGER[narrowest], name
        if narrowest is F32:
            assert error(found, here) <= 2e-6, name
            if case.exact and name.startswith("output"):
                assert torch.equal(found, here), name


def check_backend(kernel: Any, case: Case, allowed: float = 0.0) -> None:
    """Forward and backward of a backend are no further from float64 than Hugging Face's.

    ``allowed`` is how many eps further they may be, for sums in an order of their own.

    Shapes, dtypes and the places of NaN and Inf are the original's, and an output that is not zero
    requires a gradient where the reference's does; inputs and incoming gradients stay as they
    were, and no output shares their memory.
    """
    device = device_of(kernel)
    arguments, options = inputs = case.inputs(device)
    if kernel.backend != "torch" and (why := kernel.why_fallback(*arguments, **options)):
        pytest.skip(f"handed back to the original: {why}")
    eager = run(case.original, case.inputs(device))
    upstream = _upstream(eager)
    eager = run(case.original, case.inputs(device), upstream)
    found = run(kernel.load(), case.inputs(device), upstream)
    truth = _truth(case, upstream)
    for ours, wide in zip(found.outputs, truth.outputs, strict=True):
        assert ours.requires_grad == wide.requires_grad or not wide.any()
    for (name, ours), (_, theirs), (_, wide) in zip(
        found.tensors(), eager.tensors(), truth.tensors(), strict=True
    ):
        if ours is None or theirs is None:
            assert _nothing(ours, theirs), name
            continue
        assert ours.shape == theirs.shape, name
        assert ours.dtype == theirs.dtype, name
        if case.exact and kernel.backend == "torch" and name.startswith("output"):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), name
        wide = torch.zeros_like(ours) if wide is None else wide
        for test in (torch.isnan, torch.isposinf, torch.isneginf):
            # On some processors torch's own gelu makes NaN of infinity, where float64 does not.
            right = (test(ours) == test(theirs)) | (test(ours) == test(wide))
            assert right.all(), (name, test.__name__)
        ours, theirs, wide = _finite(theirs, ours, theirs, wide)
        size = max(1, min(ours.numel(), arguments[0].numel()))
        floor = FLOOR[ours.dtype] * torch.finfo(ours.dtype).eps
        if size < 16:
            floor = FEW * torch.finfo(_narrowest(inputs, found)).eps
        floor += allowed * torch.finfo(ours.dtype).eps
        limit = (1.1 + 5 / size**0.5) * error(theirs, wide) + floor
        assert error(ours, wide) <= limit, f"{name}: {error(ours, wide)} > {limit}"


def check_double_backward(kernel: Any, case: Case) -> None:
    """Gradients of a gradient penalty are eager's; a float32 case."""
    device = device_of(kernel)

    def penalty(function: Callable[..., Any]) -> list[torch.Tensor | None]:
        arguments, options = case.inputs(device)
        leaves = _leaves((arguments, options))
        outputs = _flat(function(*arguments, **options))
        weighted = sum((out * out).sum() for out in outputs)
        first = torch.autograd.grad(weighted, leaves, create_graph=True)
        return list(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))

    for ours, theirs in zip(penalty(kernel.load()), penalty(case.original), strict=True):
        assert ours is not None and theirs is not None
        assert error(ours.cpu(), theirs.cpu()) <= 2e-6


def check_saves_nothing(kernel: Any, case: Case) -> None:
    """Without gradients to compute there is no graph and nothing is kept."""
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x):
        arguments, options = case.inputs(device_of(kernel))
        with torch.no_grad():
            outputs = _flat(kernel.load()(*arguments, **options))
        arguments, options = tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf,
            (arguments, options),
        )
        outputs += _flat(kernel.load()(*arguments, **options))
    assert not packed
    assert all(out.grad_fn is None for out in outputs)


def check_same_bits(kernel: Any, case: Case) -> None:
    """Outputs and gradients are the same bits each time, and torch's strict mode allows them."""
    upstream = _upstream(run(case.original, case.inputs(device_of(kernel))))
    # What cuBLAS wants of a program that asks for it; it is read at each product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (
            run(kernel.load(), case.inputs(device_of(kernel)), upstream).tensors() for _ in range(3)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for found in others:
        for (name, one), (_, other) in zip(first, found, strict=True):
            assert (one is None) == (other is None), name
            assert one is None or other is None or torch.equal(one, other), name


def device_of(kernel: Any) -> str:
    """The device type to test a kernel on; skips the test where it cannot run."""
    if why := registry.unavailable(kernel):
        pytest.skip(why)
    return "cpu" if kernel.device == "any" else str(kernel.device)


def run(
    function: Callable[..., Any],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    upstream: list[torch.Tensor] | None = None,
) -> Outcome:
    """Outputs, and gradients of everything that requires one where ``upstream`` is given."""
    arguments, options = inputs
    tensors = _tensors(inputs) + (upstream or [])
    before = [(tensor._version, tensor.detach().clone()) for tensor in tensors]
    outcome = Outcome(_flat(function(*arguments, **options)))
    if upstream is not None:
        graph = [pair for pair in zip(outcome.outputs, upstream) if pair[0].requires_grad]
        wanted = _leaves(inputs)
        found: Any = [None] * len(wanted)
        if graph:
            ends, incoming = zip(*graph, strict=True)
            found = torch.autograd.grad(ends, wanted, incoming, allow_unused=True)
        outcome.gradients = _pooled(inputs, wanted, found)
    for tensor, (version, copy) in zip(tensors, before, strict=True):
        assert tensor._version == version, "an input was written to"
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num()), "an input was changed"
        for out in outcome.outputs:
            assert not out.numel() or out.data_ptr() != tensor.data_ptr(), "an input was returned"
    return outcome


def _upstream(outcome: Outcome) -> list[torch.Tensor]:
    """Incoming gradients: random, the second output's expanded as sum gives it, a loss's 2."""
    return [
        torch.full_like(out, 2, requires_grad=False)
        if not out.dim()
        else draw(
            tuple(out.shape),
            out.dtype,
            seed=99 + i,
            layout="expanded" if i and out.dim() > 1 else "contiguous",
            grad=False,
            device=out.device.type,
        )
        for i, out in enumerate(outcome.outputs)
    ]


def _truth(case: Case, upstream: list[torch.Tensor]) -> Outcome:
    """The reference in float64 on the very same values; on the CPU, as an npu has no float64."""
    arguments, options = tree_map(_doubled, case.inputs(upstream[0].device.type))
    wide = [grad.cpu().double() for grad in upstream]
    found = run(lambda *a, **k: case.reference(*a, **k, dtype=F64), (arguments, options), wide)
    assert {out.dtype for out in found.outputs} == {F64}
    return found


def _doubled(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    here = leaf.detach().cpu()
    return here.double().requires_grad_(leaf.requires_grad) if here.is_floating_point() else here


def _leaves(inputs: Any) -> list[torch.Tensor]:
    """The input tensors that require a gradient."""
    return [tensor for tensor in _tensors(inputs) if tensor.requires_grad]


def _tensors(inputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]


def _pooled(inputs: Any, leaves: list[torch.Tensor], found: Any) -> list[torch.Tensor | None]:
    """One gradient an argument: a list of experts has its gradients side by side."""
    gradients = dict(zip(map(id, leaves), found, strict=True))
    pooled: list[torch.Tensor | None] = []
    for argument in (*inputs[0], *inputs[1].values()):
        mine = _leaves(argument)
        parts = [gradients[id(leaf)] for leaf in mine]
        if len(mine) > 1 and any(part is not None for part in parts):
            pairs = zip(mine, parts, strict=True)
            full = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in pairs]
            parts = [torch.cat([grad.flatten() for grad in full])]
        pooled += parts[:1]
    return pooled


def _flat(outputs: Any) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _narrowest(inputs: Any, outcome: Outcome) -> torch.dtype:
    """The dtype with the fewest bits among inputs and outputs."""
    tensors = (*_tensors(inputs), *outcome.outputs)
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _nothing(*gradients: torch.Tensor | None) -> bool:
    """Whether every gradient is zero, or none at all, which is the same."""
    return all(gradient is None or not gradient.any() for gradient in gradients)


def _finite(mask: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with zeros where ``mask`` is NaN or Inf."""
    hidden = ~mask.isfinite()
    return [tensor.detach().masked_fill(hidden, 0) for tensor in tensors]

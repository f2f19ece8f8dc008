"""The whole model, as it is, patched, and in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.errors import KernelPatchError, cut
from hf_kernel_patch.verifying.comparing import Measure, compared, epsilon_of, mean, worst
from hf_kernel_patch.verifying.finding import layers_of
from hf_kernel_patch.verifying.keeping import forget_graphs
from hf_kernel_patch.verifying.measuring import Result, device_for_double, double_of, flattened
from hf_kernel_patch.verifying.steering import Choices, steered

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Bytes that a weight takes in float64: itself, its gradient, and the same of the two other runs.
_BYTES = 8 + 8 + 4 + 4
GIB = 2**30


class Whole:
    """The runs of a model on a batch; all take the choices of the first.

    Only what fits into memory is compared: ``why_not`` says what does not.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], seed: int):
        self.model, self.batch = model, batch
        self._choices, self._seed = Choices(), seed

    def forward(self) -> object:
        """One forward as it is, for those who listen to it; KernelPatchError where it fails."""
        import torch

        torch.manual_seed(self._seed)
        forget_graphs(self.model)
        try:
            with steered(Choices()):
                return self.model(**self.batch)
        except Exception as error:
            raise KernelPatchError(
                f"{cut(type(self.model).__name__)} cannot be run on this batch: "
                f"{type(error).__name__}: {cut(str(error), 500)}"
            ) from error

    def run(self) -> Result:
        """The model as it is now, patched or not."""
        return self._run(self.model, dict(self.batch), wide=False)

    def truth(self, device: str | None) -> Result:
        """A copy of the model in float64, there. Only while nothing is patched."""
        import torch

        copied = double_of(self.model, device)
        given = {
            name: (value.double() if value.is_floating_point() else value).to(
                device or value.device
            )
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.batch.items()
        }
        return self._run(copied, given, wide=True)

    def _run(self, model: nn.Module, batch: dict[str, Any], wide: bool) -> Result:
        import torch

        hidden: dict[str, torch.Tensor] = {}

        def listen(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: object, output: object) -> None:
                first = next(iter(flattened(output).values()), None)
                if first is not None:
                    hidden.setdefault(f"after {path}", first.detach())

            return hook

        handles = [
            layer.register_forward_hook(listen(path)) for path, layer in layers_of(model).items()
        ]
        torch.manual_seed(self._seed)
        forget_graphs(model)
        try:
            with steered(self._choices, wide):
                output = model(**batch)
                outputs = flattened(output)
                target = outputs.get("loss")
                own = {name: one for name, one in model.named_parameters() if one.requires_grad}
                gradients: dict[str, torch.Tensor | None] = {}
                if target is not None and target.requires_grad and own:
                    found = torch.autograd.grad(target, list(own.values()), allow_unused=True)
                    gradients = dict(zip(own, found, strict=True))
        finally:
            for handle in handles:
                handle.remove()
        kept = {name: one.detach() for name, one in outputs.items() if name in ("loss", "logits")}
        kept = kept or {name: one.detach() for name, one in outputs.items()}
        return Result({**kept, **hidden}, gradients)


def whole_measures(
    ours: Result, eager: Result, truth: Result, model: nn.Module, factor: float
) -> list[Measure]:
    """Loss and logits, the worst hidden states, and the mean of all gradients."""
    epsilon = epsilon_of(model.parameters())
    measures = compared(ours, eager, truth, epsilon, factor)
    hidden = [one for one in measures if not one.gradient and one.name.startswith("after ")]
    plain = [one for one in measures if not one.gradient and one not in hidden]
    order = list(truth.outputs)
    found = [*sorted(plain, key=lambda one: order.index(one.name)), worst(hidden, gradient=False)]
    found.append(mean(measures, "gradients, their mean", epsilon, factor))
    return [one for one in found if one is not None]


def why_no_double(weights: Iterable[torch.Tensor]) -> str:
    """Why weights cannot be copied in float64, or ""."""
    held = list(weights)
    if any(one.is_meta for one in held):
        return "weights on the meta device have no values here"
    odd = {one.dtype for one in held if not one.is_floating_point() or one.element_size() < 2}
    names = ", ".join(sorted(str(one).removeprefix("torch.") for one in odd))
    return f"weights in {names} have no float64" if odd else ""


def room_for(model: nn.Module) -> tuple[str | None, str]:
    """The device to run a float64 copy on, None for the model's own, and why there is none."""
    weights = list(model.parameters())
    if why := why_no_double(weights):
        return None, why
    need = sum(one.numel() for one in weights) * _BYTES
    devices = {one.device for one in weights}
    (device, *others) = devices
    if not others and device_for_double(device) is None:
        free = _free(device)
        if free is None or need < 0.8 * free:
            return None, ""
    free = _free(None)
    if device.type != "cpu" and (free is None or need < 0.8 * free):
        return "cpu", ""
    room = f" and {free / GIB:.1f} are free" if free is not None else ""
    return None, f"its float64 copy with all gradients needs {need / GIB:.1f} GiB{room}"


def _free(device: torch.device | None) -> int | None:
    """Free bytes of a device, by default of the CPU's memory; None where nobody says."""
    import torch

    if device is not None and device.type in ("cuda", "npu"):
        return int(getattr(torch, device.type).mem_get_info(device)[0])
    if device is not None and device.type != "cpu":
        return None
    told = Path("/proc/meminfo")
    if not told.exists():
        return None
    line = next(one for one in told.read_text().splitlines() if one.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024

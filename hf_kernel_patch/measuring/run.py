"""One model in one mode, training or inference: its steps, and what serves its calls now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import ref

from hf_kernel_patch.measuring import models
from hf_kernel_patch.measuring.choice import Choice
from hf_kernel_patch.measuring.schedule import Schedule

#: Why a kernel serves nothing in a step that is timed without it.
LEFT_OUT = "measured: left out of this step, which is timed"
#: Steps of an optimizer that has none of the model's weights, as of copies in another precision,
#: after which it is taken for the model's.
STRANGER = 3

#: (op, id of a module) of a call, and with it the place in the model's code.
Place = tuple[str, int]


class Run:
    """What is known of one model in one mode; it holds the model weakly.

    Attributes:
        where: for messages, the model's class, its device and the mode.
        other: the same model in the other mode.
        entry: the first call of a forward.
        out: op -> why the original serves its calls now.
        key: what the choice depends on; None where it was not asked for yet.
        token: of inference, whether the forward that runs now decodes a token.
    """

    other: Run

    def __init__(self, model: Any, training: bool, out: Mapping[str, str]):
        self.model = ref(model)
        self.training = training
        self.devices = models.devices_of(model)
        self.on_cuda = any(device.type == "cuda" for device in self.devices)
        kinds = ", ".join(sorted({device.type for device in self.devices}))
        mode = "training" if training else "inference"
        self.where = f"{type(model).__name__}, {kinds}, {mode}"
        self._files = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
        self.entry: Place | None = None
        self.out = out
        self.key: dict[str, Any] | None = None
        self.choice: Choice | None = None
        self.schedule: Schedule | None = None
        self.token = False
        #: Of the step that runs: when it began, the thread, its tokens, whether anything was called
        #: and whether it cannot be compared with others.
        self.began: float | None = None
        self.thread = 0
        self.size = 0
        self.called = self.spoiled = False
        #: Of training, whether the optimizer has made a step since.
        self.stepped = False
        self._optimizer: ref[Any] | None = None
        self._strangers: dict[int, int] = {}
        self._steps_of_others = 0

    def concerns(self, site: str) -> bool:
        """Whether the model has modules of the file that a site lies in."""
        return any(site.startswith(f"{name}.") for name in self._files)

    def begin(self, now: float, thread: int, size: int = 0) -> None:
        """A step begins."""
        self.began, self.thread, self.size = now, thread, size
        self.called, self.spoiled, self.stepped = bool(size), False, False

    def is_bound_by(self, optimizer: Any) -> bool:
        """Whether a step of this optimizer ends a training step of the model.

        Of several optimizers it is one alone, so that whole steps are compared.
        """
        held = self._optimizer and self._optimizer()
        if held is optimizer:
            self._steps_of_others = 0
            return True
        self._steps_of_others += 1
        if held is not None and self._steps_of_others < 2**6:
            return False
        if not self.called:
            return False
        if not self._has_weights_in(optimizer):
            count = self._strangers[id(optimizer)] = self._strangers.get(id(optimizer), 0) + 1
            if count < STRANGER:
                return False
        self._optimizer, self._steps_of_others = ref(optimizer), 0
        self.began = None  # what began with another optimizer is no whole step
        return True

    def _has_weights_in(self, optimizer: Any) -> bool:
        model = self.model()
        ours = set() if model is None else {id(one) for one in model.parameters()}
        return any(id(one) in ours for group in optimizer.param_groups for one in group["params"])

    def text(self, op: str) -> str:
        """What a row of a report says of its op."""
        if self.choice is not None:
            return self.choice.text(op, self.where)
        if self.schedule is not None:
            done = f"{self.schedule.steps} of at most {self.schedule.limit} steps"
            return f"measured: {done} are timed ({self.where})"
        return f"measured: no step is timed yet, it is as auto has it ({self.where})"


def left_out(every: Iterable[str], schedule: Schedule) -> dict[str, str]:
    """Op -> why it is out of a step that is timed."""
    return {op: LEFT_OUT for op in every if op not in schedule.ops}

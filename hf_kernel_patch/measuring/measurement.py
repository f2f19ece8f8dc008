"""All that one patch measures: which model calls, where its steps end, and what is chosen."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import devices, settings
from hf_kernel_patch.kernels import Kernel
from hf_kernel_patch.measuring import cache, calls, models, optimizers
from hf_kernel_patch.measuring.choice import Choice
from hf_kernel_patch.measuring.lines import Lines
from hf_kernel_patch.measuring.owners import Owners, caller
from hf_kernel_patch.measuring.run import Run, left_out
from hf_kernel_patch.measuring.schedule import Schedule
from hf_kernel_patch.recognition.measured import NOT_TRIED

if TYPE_CHECKING:
    from torch import nn

#: As long as seconds are told in; tests put another clock here.
clock: Callable[[], float] = time.perf_counter
#: Ops of which nothing is asked here: a token is decoded as "auto" has it.
NOT_ASKED = {"decode_attention"}
#: Models and modes that reports tell of, and steps of others that a model waits for.
MOST_TOLD, PATIENCE = 32, 64


class Measurement:
    """The measuring of one patch, until ``end``.

    Args:
        kernels: op -> kernel, of all that the patch has.
        options: (op or kernel id, option, value), as given.
        excluded: what the patch leaves out, which the choice depends on.
        tell: logs a line.
    """

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        options: tuple[tuple[str, str, object], ...],
        excluded: tuple[str, ...],
        tell: Callable[..., None],
    ):
        here = devices.current()
        asked = {op: one for op, one in kernels.items() if op not in NOT_ASKED}
        self._ops = frozenset(op for op, one in asked.items() if here in one.default_on)
        self._extras = tuple(op for op in asked if op not in self._ops)
        self._as_auto = dict.fromkeys(self._extras, NOT_TRIED)
        self._chosen = {
            "kernels": {op: one.kernel_id for op, one in sorted(kernels.items())},
            "options": sorted([owner, name, str(value)] for owner, name, value in options),
            "excluded": sorted(excluded),
        }
        self._lines = Lines(tell)
        self.noting = False
        self._lock = threading.RLock()
        self._owners = Owners(self._as_auto)
        self._told: list[Run] = []
        #: What was chosen in this process, by its key.
        self._made: dict[str, Choice] = {}
        #: The run whose steps are timed now: one at a time, so that no other changes meanwhile.
        self._turn: Run | None = None
        self._waited = 0
        #: The forward without gradients that is timed now.
        self._open: Run | None = None
        self._listens = self._ended = False

    def end(self) -> None:
        """The patch ends: nothing is timed any more."""
        with self._lock:
            self._ended, self.noting, self._open, self._turn = True, False, None, None
            optimizers.stop(self._stepped)
            self._owners.forget()

    def text(self, site: str, op: str) -> str:
        """What a row says of its site; "" where nothing is asked of its op."""
        if op in NOT_ASKED:
            return ""
        with self._lock:
            told = [run.text(op) for run in self._told if run.concerns(site)]
        return "; ".join(dict.fromkeys(told)) or "measured: no step is timed yet"

    def why_out(
        self, op: str, module: nn.Module | None, arguments: tuple[object, ...]
    ) -> str | None:
        """Why the original is to serve a call now, or None."""
        owners = self._owners
        module = caller(2) if module is None else module  # a function serves many models
        if module is None:
            run = owners.last()
        else:  # as run_of does, without a call
            runs = owners.runs_of.get(id(module)) or owners.find(module)
            run = owners.thread.run = runs[0 if module.training or owners.gradients() else 1]
        if run is None:
            return self._as_auto.get(op)
        if run.choice is None:
            return self._measured(run, (op, id(module)), arguments).get(op)
        if self._open is not None:  # a forward before this call has ended
            self.decodes(module)
        if run.training:
            return run.out.get(op)
        if run.entry == (op, id(module)):
            run.token = calls.is_token(arguments)
            run.other.spoiled = True
        return (self._as_auto if run.token else run.out).get(op)

    def served(self, op: str) -> None:
        """A kernel serves the call that was asked about last in this thread."""
        run = self._owners.last()
        if run is not None and (schedule := run.schedule) is not None:
            schedule.served(op)

    def sees(self, module: nn.Module) -> None:
        """A module calls a function, which knows nothing of the module."""
        self._owners.run_of(module)

    def decodes(self, model: nn.Module | None) -> None:
        """A model decodes a token: a forward before it has ended."""
        run = self._open
        if run is not None and not (run.on_cuda and models.capturing()):
            with self._lock:
                self._close()
            self._lines.speak()

    def _measured(
        self, run: Run, place: tuple[str, int], arguments: tuple[Any, ...]
    ) -> Mapping[str, str]:
        """Op -> why it is out, in a call while nothing is chosen yet."""
        with self._lock:
            if run.choice is not None:
                return run.out
            if self._ended or (run.on_cuda and models.capturing()):
                return self._as_auto
            if run.entry is None:
                run.entry = place
            if run.training:
                self._in_training(run, run.entry == place, arguments)
            else:
                self._in_inference(run, run.entry == place, arguments)
            out = self._as_auto if run.token else run.out
        self._lines.speak()
        return out

    def _in_training(self, run: Run, enters: bool, arguments: tuple[Any, ...]) -> None:
        """A call of a model that trains.

        A step ends where the first forward after the optimizer's step begins. What is computed
        again in a backward is so as it was the first time, also where optimizers step within it.
        """
        self._close()
        if calls.in_backward():
            return
        if run.stepped:
            self._next_step(run)
        run.called = True
        if enters:
            tokens = calls.tokens_of(arguments)
            run.size += tokens
            if run.key is None:
                self._look_up(run, tokens)

    def _in_inference(self, run: Run, enters: bool, arguments: tuple[Any, ...]) -> None:
        """A call without gradients. A step ends where the next forward begins, of any model."""
        if self._open is not run:
            self._close()
        if not enters:
            return
        self._close()
        run.other.spoiled = True  # by an evaluation within a training step
        run.token = calls.is_token(arguments)
        if run.token:
            return
        if run.key is None:
            self._look_up(run, calls.tokens_of(arguments))
        if run.choice is not None:
            return
        if not self._has_turn(run):
            run.out = self._as_auto
            return
        schedule = self._schedule_of(run)
        run.out = left_out(self._every(), schedule)
        models.synchronize(run.devices)
        run.begin(clock(), threading.get_ident(), calls.tokens_of(arguments))
        self._open = run

    def _close(self) -> None:
        """End the forward that is timed, if one is."""
        run, self._open = self._open, None
        if run is None or run.began is None or run.schedule is None:
            return
        models.synchronize(run.devices)
        spoiled = run.spoiled or run.thread != threading.get_ident()
        self._timed(run, None if spoiled else clock() - run.began)
        run.began = None

    def _stepped(self, optimizer: Any) -> None:
        """An optimizer has made a step."""
        with self._lock:
            if self._open is not None:
                self._open.spoiled = True
            for run in [one for one in self._told if one.training and one.choice is None]:
                run.stepped = run.is_bound_by(optimizer) or run.stepped

    def _next_step(self, run: Run) -> None:
        """A training step of a model has ended, and the next begins."""
        if self._has_turn(run):
            schedule = self._schedule_of(run)
            models.synchronize(run.devices)
            if run.began is not None:
                self._timed(run, None if run.spoiled else clock() - run.began)
            if run.choice is not None:
                return
            run.out = left_out(self._every(), schedule)
            self.noting = schedule.warming_up
            run.begin(clock(), 0)
        else:
            run.out, run.began, run.stepped = self._as_auto, None, False

    def _has_turn(self, run: Run) -> bool:
        """Whether the steps of this run are timed now."""
        turn = self._turn
        if turn is not run:
            self._waited += 1
            gone = turn is None or turn.choice is not None or turn.model() is None
            first = turn is not None and run.training and not turn.training
            if not (gone or first) and self._waited < PATIENCE:
                return False
            if turn is not None:
                turn.began = None
            self._turn = run
        self._waited = 0
        return True

    def _schedule_of(self, run: Run) -> Schedule:
        if run.schedule is None:
            together = settings.rank() is not None
            run.schedule = Schedule(self._ops, self._extras, together)
            self._lines.say("%s: measuring, for at most %d steps", run.where, run.schedule.limit)
        self.noting = run.schedule.warming_up
        return run.schedule

    def _timed(self, run: Run, seconds: float | None) -> None:
        """A step of a run has ended."""
        schedule = run.schedule
        assert schedule is not None
        schedule.step(seconds, run.size)
        if schedule.verdict is None:
            return
        made = Choice(schedule.verdict, schedule.steps)
        key = self._key(run)
        made = replace(made, unkept=cache.store(key, made) if key else "its key is not known")
        self._made[json.dumps(key)] = made
        self._take(run, made)
        self._lines.say("%s: measured in %d steps: %s", run.where, made.steps, made.summary())
        if made.unkept:
            self._lines.say("%s", made.unkept)

    def _look_up(self, run: Run, tokens: int) -> None:
        """Take what was chosen before for such a model, if anything was."""
        try:
            run.key = models.key_of(run.model(), run.training, tokens)
        except Exception as error:  # of a config of somebody's own: it can be measured all the same
            run.key = {}
            self._lines.say("%s: nothing is kept: %s", run.where, type(error).__name__)
        if len(self._told) >= MOST_TOLD:
            self._told = [one for one in self._told if one.model() is not None][1 - MOST_TOLD :]
        self._told.append(run)
        key = self._key(run)
        found, problem = self._made.get(json.dumps(key)) if key else None, ""
        if key and found is None:
            found, problem = cache.load(key)
        if problem:
            self._lines.say("%s: %s", run.where, problem)
        if found is not None:
            self._take(run, found)
            self._lines.say("%s: %s: %s", run.where, found.source, found.summary())
        elif not self._listens:
            self._listens = True
            optimizers.listen(self._stepped)

    def _key(self, run: Run) -> dict[str, Any]:
        return {**run.key, **self._chosen} if run.key else {}

    def _take(self, run: Run, made: Choice) -> None:
        """From now on a choice is in force."""
        out = [op for op in self._every() if op not in made.verdict.ops]
        run.out = {op: made.why_out(op, run.where) for op in out}
        run.choice, run.schedule, self.noting = made, None, False
        if self._turn is run:
            self._turn = None

    def _every(self) -> list[str]:
        return [*self._ops, *self._extras]

"""A patch for the length of a block or of a decorated function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from hf_kernel_patch.errors import cut, raise_if_blocked
from hf_kernel_patch.patching import log, watching
from hf_kernel_patch.patching.choosing import activation_of, choose, report_of, select
from hf_kernel_patch.patching.global_patch import Activation
from hf_kernel_patch.patching.report import PatchReport
from hf_kernel_patch.settings import UNSET, Config, Include, Names, Options

F = TypeVar("F", bound=Callable[..., Any])


class patched:
    """``patch_transformers`` for the length of a ``with`` block or of a decorated function.

    Takes the same arguments; ``as`` gives the report. Blocks nest: an inner one adds to the outer
    ones, and where both replace the same place the inner one is in force. The patch is seen by
    all threads. A decorated coroutine function is patched while it runs.
    """

    def __init__(
        self,
        include: Include = UNSET,
        *,
        exclude: Names | None = UNSET,
        models: Names = UNSET,
        backend: str = UNSET,
        strict: bool | str = UNSET,
        options: Options = UNSET,
        config: Config = None,
        verbose: bool = False,
    ):
        if verbose:
            log.show()
        self._wanted, _ = choose(
            config,
            include=include,
            exclude=exclude,
            models=models,
            backend=backend,
            strict=strict,
            options=options,
        )
        self._entered: list[Activation] = []
        self._told = False  # a decorated function may be called often

    def __enter__(self) -> PatchReport:
        made = activation_of(self._wanted, select(self._wanted))
        if made.kernels:
            watching.prepare()
        made.apply()
        self._entered.append(made)
        if not self._told:
            log.tell("%s", report_of(made).summary())
        self._told = True
        return report_of(made)

    def __exit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        blocked = self._entered.pop().undo()
        if error is None:
            raise_if_blocked(blocked)
        elif blocked:
            error.add_note(f"hf_kernel_patch could not restore: {'; '.join(blocked)}")

    def __call__(self, function: F) -> F:
        import wrapt

        called = _called(function)
        if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
            raise TypeError(
                f"{cut(called.__qualname__)} is a generator, which would run outside of the patch; "
                "use `with patched(...)` inside it"
            )

        async def run(wrapped: F, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            with self:
                return await wrapped(*args, **kwargs)

        @wrapt.decorator
        def wrapper(wrapped: Any, instance: object, args: Any, kwargs: Any) -> Any:
            if inspect.iscoroutinefunction(wrapped):
                return run(wrapped, args, kwargs)
            with self:
                return wrapped(*args, **kwargs)

        decorated: Any = wrapper(function)
        return decorated


def _called(function: Any) -> Any:
    """The function whose body runs when a decorated object is called."""
    while isinstance(function, (staticmethod, classmethod, partial)):
        function = function.func if isinstance(function, partial) else function.__func__
    plain = inspect.isroutine(function) or isinstance(function, type)
    return function if plain or not callable(function) else type(function).__call__

"""Which kernels there are, which can run here, and which the settings choose."""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hf_kernel_patch import devices
from hf_kernel_patch import ops as ops_folder
from hf_kernel_patch.errors import KernelUnavailableError, cut, listed, shown, unknown
from hf_kernel_patch.kernels import (
    BaseKernel,
    Kernel,
    broken_entry_points,
    register_installed,
    registered,
)

#: Options beyond it are as good as infinite: an op that multiplies them would overflow.
HUGE = 1e300


class Scan:
    """Calls a function when it is first needed; threads that need it meanwhile wait for its end.

    The thread that runs it may need it again, as the modules it imports do: that does nothing.
    """

    def __init__(self, function: Callable[[], None]):
        self._function, self._lock = function, threading.RLock()
        self._done = self._running = False
        if hasattr(os, "register_at_fork"):
            # A child that is forked in between would find a lock, and modules half imported, that
            # nobody finishes.
            os.register_at_fork(
                before=self._lock.acquire,
                after_in_parent=self._lock.release,
                after_in_child=self._lock.release,
            )

    def __call__(self) -> None:
        if self._done:
            return
        with self._lock:
            if self._done or self._running:
                return
            self._running = True
            try:
                self._function()
                self._done = True
            finally:
                self._running = False


def kernels() -> dict[str, Kernel]:
    """Every registered kernel by id; the first call looks into ``ops/`` and installed packages."""
    _scan()
    _installed()
    return registered


def _import_ops() -> None:
    for found in pkgutil.iter_modules(ops_folder.__path__, f"{ops_folder.__name__}."):
        if found.ispkg:
            importlib.import_module(found.name)


_scan = Scan(_import_ops)
_installed = Scan(register_installed)


def _every() -> list[Kernel]:
    """The kernels of this moment: another thread may register one while they are looked at."""
    return list(kernels().values())


def ops() -> set[str]:
    """The names of all ops that some kernel serves."""
    return {kernel.op for kernel in _every() if kernel.op}


def backends() -> set[str]:
    """The names that ``backend=`` takes, "auto" among them."""
    return {"auto", *devices.BACKENDS, *(kernel.backend for kernel in _every())}


def unavailable(kernel: Kernel) -> str | None:
    """Why a kernel cannot run here, or None.

    Checks may also answer True or False, as those of kernels written for LLaMA-Factory do.
    """
    for check in (kernel.check_device, kernel.check_deps):
        answer: object = check()
        if answer is False:
            return f"{kernel.__qualname__}.{check.__name__}() says no"
        if answer not in (None, True):
            return str(answer)
    return None


def has_own_apply(kernel: Kernel) -> bool:
    """Whether the kernel patches one model in its own way, as those for LLaMA-Factory do."""
    inherited = vars(BaseKernel)["apply"].__func__
    return getattr(kernel.apply, "__func__", None) is not inherited


def available() -> list[str]:
    """Ids of the kernels that can run here."""
    return [name for name, kernel in list(kernels().items()) if unavailable(kernel) is None]


def usable_on(device: str) -> list[Kernel]:
    """The kernels that can run here on a device of that type, in the order of their ids."""
    return [
        kernel
        for _, kernel in sorted(kernels().items())
        if kernel.device in ("any", device) and unavailable(kernel) is None
    ]


def defaults(backend: str = "auto") -> dict[str, Kernel]:
    """The kernels that "auto" takes on this device, by op."""
    here = devices.current()
    found: dict[str, Kernel] = {}
    for kernel in _preferred(_every()):
        wanted = here in kernel.default_on and backend in ("auto", kernel.backend)
        if wanted and unavailable(kernel) is None:
            found.setdefault(kernel.op or kernel.kernel_id, kernel)
    return found


def tried(backend: str = "auto") -> dict[str, Kernel]:
    """The kernels that "measured" takes on this device, by op: those of "auto" and some others."""
    here, found = devices.current(), defaults(backend)
    for kernel in _preferred(_every()):
        wanted = here in kernel.tried_on and backend in ("auto", kernel.backend)
        if wanted and unavailable(kernel) is None:
            found.setdefault(kernel.op or kernel.kernel_id, kernel)
    return found


def is_name(name: str) -> bool:
    """Whether a name is a kernel's id or an op."""
    return name in kernels() or name in ops()


def require(names: Iterable[str], source: str = "") -> None:
    """ValueError for the first name that is no kernel's id and no op; it names the ``source``."""
    for name in names:
        if not is_name(name):
            raise _unknown(name, source)


def select(
    include: str | tuple[str, ...] | None,
    exclude: tuple[str, ...] = (),
    backend: str = "auto",
    sources: Mapping[str, str] | None = None,
) -> dict[str, Kernel]:
    """The kernels that the settings choose, by op.

    Raises ValueError for an unknown name and for two kernels of one op, KernelUnavailableError for
    an explicit choice that cannot run here.
    """
    given = sources or {}
    if isinstance(include, tuple):
        require(include, given.get("include", ""))
    for name in exclude:
        if not is_name(name) and not _is_pattern(name):
            error = _unknown(name, given.get("exclude", ""))
            raise ValueError(f"{error}. Sites are written as '*.LlamaMLP.forward'")
    if backend not in backends():
        raise unknown("backend", backend, backends(), given.get("backend", ""))
    if include is None:
        return {}
    if backend != "auto" and (why := _why_no_backend(backend)):
        raise KernelUnavailableError(f"backend {backend!r} cannot run here: {cut(why)}")
    if isinstance(include, str):
        chosen = tried(backend) if include == "measured" else defaults(backend)
    else:
        chosen = {}
        for name in include:
            kernel = _named(name, backend)
            op = kernel.op or kernel.kernel_id
            if chosen.setdefault(op, kernel) is not kernel:
                raise ValueError(
                    f"{chosen[op].kernel_id!r} and {kernel.kernel_id!r} both serve {op}: name one"
                )
    return {
        op: kernel
        for op, kernel in chosen.items()
        if op not in exclude and kernel.kernel_id not in exclude
    }


def site_patterns(exclude: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that mean sites, and neither a kernel nor an op."""
    return tuple(name for name in exclude if _is_pattern(name) and not is_name(name))


def _is_pattern(name: str) -> bool:
    """Whether a name may mean sites: theirs have dots, and patterns may have wildcards."""
    return any(character in name for character in ".*?[")


def unknown_kernel(kind: str, name: str, known: Iterable[str], source: str = "") -> ValueError:
    """As ``unknown``; an entry point that could not be loaded may have been meant to give it."""
    error = unknown(kind, name, known, source)
    broken = [f"{named}: {why}" for named, why in broken_entry_points.items()]
    return ValueError(f"{error}. Not loaded: {'; '.join(broken[:3])}") if broken else error


def _unknown(name: str, source: str = "") -> ValueError:
    return unknown_kernel("kernel id or op", name, {*kernels(), *ops()}, source)


def check_options(given: Iterable[tuple[str, str, object]]) -> None:
    """ValueError for an option that no kernel takes, whichever kernels are chosen."""
    for owner, option, value in given:
        owners = [k for k in _every() if owner in (k.op, k.kernel_id)]
        takes = [k for k in owners if option in k.options] or owners or _every()
        options_of(takes[0], [(owner, option, value)])


def options_of(kernel: Kernel, given: Iterable[tuple[str, str, object]]) -> dict[str, object]:
    """What was asked of one kernel, from (op or kernel id, option, value) for any of them.

    Raises ValueError for an unknown name, or a value that is not of the option's kind.
    """
    found: dict[str, object] = {}
    for owner, option, value in given:
        if not isinstance(option, str):
            raise TypeError(f"the name of an option is a string, not {shown(option)}")
        owners = [k for k in _every() if owner in (k.op, k.kernel_id)]
        if not owners:
            raise _unknown(owner, "options")
        if kernel in owners:
            if option not in kernel.options:
                raise unknown("option", option, kernel.options, f"options of {owner}")
            default, bounds = kernel.options[option], kernel.bounds.get(option)
            found[option] = _value(f"{owner}.{option}", default, bounds, value)
    return found


def _value(
    name: str, default: float | None, bounds: tuple[float, float] | None, value: Any
) -> float | None:
    """A value of the default's kind: a truth, or a number, or None where that is the default."""
    text = _word(value)
    if isinstance(default, bool):
        if text in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return text in ("1", "true", "yes", "on")
        raise ValueError(f"the option {name} is true or false, not {shown(value)}")
    if default is None and text in ("none", "null", "auto", ""):
        return None
    if isinstance(value, bool):  # which float takes for 0 or 1
        raise ValueError(f"the option {name} is a number, not {value}")
    try:
        number = float(value)
    except OverflowError:  # an int that no float can hold
        number = math.inf
    except (TypeError, ValueError, RuntimeError):  # the last is torch's
        raise ValueError(f"the option {name} is a number, not {shown(value)}") from None
    least, most = bounds or (-math.inf if default is not None and default < 0 else 0.0, HUGE)
    above = bounds is None and default is None
    if math.isfinite(number) and least <= number <= most and not (above and number == 0):
        return number
    wanted = ["a finite number"]
    if least > -math.inf:
        wanted.append(f"{'above' if above else 'at least'} {least:g}")
    if most < HUGE:
        wanted.append(f"at most {most:g}")
    raise ValueError(f"the option {name} is {', '.join(wanted)}; not {shown(value)}")


def _word(value: object) -> str:
    """A value as text to compare, or "?": the text of a container may be too long to be made."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "?"
    return (shown(value) if type(value) is int else str(value)).strip().lower()


def _named(name: str, backend: str) -> Kernel:
    if name in kernels():
        kernel = kernels()[name]
        if why := unavailable(kernel):
            raise KernelUnavailableError(f"kernel {name!r} cannot run here: {cut(why)}")
        return kernel
    reasons = {}
    for kernel in _preferred(k for k in _every() if k.op == name):
        if backend not in ("auto", kernel.backend):
            reasons[kernel.kernel_id] = f"its backend is {kernel.backend!r}"
        elif why := unavailable(kernel):
            reasons[kernel.kernel_id] = why
        else:
            return kernel
    why_not = listed((f"{kernel_id}: {why}" for kernel_id, why in reasons.items()), "; ")
    raise KernelUnavailableError(f"no kernel for {name!r} can run here ({why_not})")


def _why_no_backend(backend: str) -> str | None:
    """None if some kernel of the backend is available, else the reasons."""
    reasons = [unavailable(k) for k in _every() if k.backend == backend]
    if not reasons:
        return devices.why_no_backend(backend) or "no kernel is registered for it"
    return None if None in reasons else str(reasons[0])


def _preferred(found: Iterable[Kernel]) -> list[Kernel]:
    """Kernels written for one device before those for any."""
    return sorted(found, key=lambda kernel: kernel.device == "any")

"""What a kernel is, and the register of all: knows neither ops, nor code, nor patches."""

from __future__ import annotations

import inspect
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hf_kernel_patch import devices
from hf_kernel_patch.errors import cut, shown, warn

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")


@dataclass(frozen=True)
class Op:
    """What all kernels of an op have in common, declared once.

    ``why_fallback`` takes the op's arguments and says why no kernel can take such a call, or
    returns None. Its keywords beside them are limits that a kernel may set.
    """

    name: str
    why_fallback: Callable[..., str | None]

    @cached_property
    def parameters(self) -> dict[str, object]:
        """The op's parameters in their order, with their defaults (``inspect.Parameter.empty``)."""
        found = inspect.signature(self.why_fallback).parameters.values()
        return {one.name: one.default for one in found if one.kind is one.POSITIONAL_OR_KEYWORD}


class BaseKernel:
    """One op on one device. A subclass with ``@register_kernel`` is all that a new kernel needs.

    The class is a light descriptor: defining it imports no backend. ``function`` is the op itself,
    or ``"package.module:name"``, imported at first use; it takes the op's arguments, as the ops'
    ``reference.py`` files define them.
    """

    kernel_id: ClassVar[str] = ""
    op: ClassVar[str] = ""
    #: The op's declaration, where there is one: it gives ``op``, and ``why_fallback`` unless a
    #: kernel has its own.
    implements: ClassVar[Op | None] = None
    #: What ``why_fallback`` hands to the declaration's ``why_fallback`` beside a call's arguments.
    limits: ClassVar[Mapping[str, float]] = {}
    #: torch's device type, or "any".
    device: ClassVar[str] = "any"
    #: What it is written in: "torch", "triton", "npu" or a name of your own.
    backend: ClassVar[str] = "torch"
    #: Device types on which "auto" takes this kernel.
    default_on: ClassVar[tuple[str, ...]] = ()
    #: Device types on which "measured" tries it too, since it pays for some models alone.
    tried_on: ClassVar[tuple[str, ...]] = ()
    #: Packages that have to be importable.
    requires: ClassVar[tuple[str, ...]] = ("torch",)
    #: Whether torch.compile may trace the function; otherwise it sees the original.
    traceable: ClassVar[bool] = False
    function: ClassVar[str | Callable[..., Any]] = ""
    #: Options that users may set, with their defaults.
    options: ClassVar[Mapping[str, bool | float | None]] = {}
    #: The least and the greatest value of options that are numbers, both allowed. One that is not
    #: named goes from 0, or has no least value where its default is below 0; one whose default
    #: is None is above 0.
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}
    #: Leaves and rules of an op of your own (see docs/kernels.md); those of the ops here are in
    #: ``recognition/``.
    code: ClassVar[tuple[object, ...]] = ()
    #: The old name of ``code``.
    forms: ClassVar[tuple[object, ...]] = ()

    @classmethod
    def check_device(cls) -> str | None:
        """None where the device is usable here, else the reason why not."""
        return devices.why_not(cls.device)

    @classmethod
    def check_deps(cls) -> str | None:
        """None where every required package is importable, else the reason why not."""
        missing = [name for name in cls.requires if devices.missing_package(name)]
        return f"needs the package {', '.join(missing)}" if missing else None

    @classmethod
    def why_fallback(cls, *arguments: Any) -> str | None:
        """Why this call's arguments go to the original code, or None; asked at every call."""
        return None

    #: The old name, which every class has for its own.
    refuse = why_fallback

    @classmethod
    def no_gain(cls, *arguments: Any) -> str | None:
        """Why this call, which it could take, stays with the original unless the kernel was named.

        None where it pays. For an op that is slower than the original at a size or in a dtype.
        """
        return None

    @classmethod
    def load(cls) -> Callable[..., Any]:
        """The op's function, imported now."""
        function = cls.function
        return pkgutil.resolve_name(function) if isinstance(function, str) else function

    @classmethod
    def apply(cls, *, model: M) -> M:
        """Patch one model and return it; override it for a kernel that patches in its own way."""
        patched: M = _above["patch_model"](model, {cls.op: cls}, explicit=True)
        return patched

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # Kernels written for LLaMA-Factory name them _kernel_id and _device.
        for name in ("kernel_id", "device"):
            if f"_{name}" in vars(cls):
                value = vars(cls)[f"_{name}"]
                setattr(cls, name, getattr(value, "value", value))
        own, declared = vars(cls), cls.implements
        if "refuse" in own and "why_fallback" not in own:
            warnings.warn(
                f"{cls.__qualname__}.refuse is old: call it why_fallback",
                DeprecationWarning,
                stacklevel=2,
            )
            cls.why_fallback = own["refuse"]  # type: ignore[method-assign]
        if declared is not None and ("implements" in own or "limits" in own):
            cls.op = declared.name
            given = isinstance(inspect.getattr_static(cls, "why_fallback"), staticmethod)
            if "why_fallback" not in own and ("implements" in own or given):
                # A plain function: it is asked at every call, where a frame or a partial costs.
                why_fallback = declared.why_fallback
                if cls.limits:
                    why_fallback = _with_keywords(why_fallback, cls.limits)
                cls.why_fallback = staticmethod(why_fallback)  # type: ignore[method-assign]
        if "why_fallback" in own:  # for who asks by the old name, super() among them
            cls.refuse = own["why_fallback"]


def _with_keywords(function: Any, values: Mapping[str, float]) -> Any:
    """The function with other defaults of its keywords."""
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = {**function.__kwdefaults__, **values}
    return copy


Kernel = type[BaseKernel]
K = TypeVar("K", bound=Kernel)
#: Every kernel that was registered so far, by id; ``registry.kernels()`` has those of the ops too.
registered: dict[str, Kernel] = {}
#: What the parts above do for kernels; each gives its own when it is imported.
_above: dict[str, Callable[..., Any]] = {}


def provide(function: Callable[..., Any], name: str = "") -> None:
    """Make a function of a part above known here: "patch_model" or "register_code"."""
    _above[name or function.__name__] = function


def register_kernel(cls: K) -> K:
    """Class decorator: make a BaseKernel subclass known under its ``kernel_id``; returns it.

    Raises TypeError for something else than a BaseKernel subclass and ValueError for a missing id,
    or an id that another class holds (defining the same class again, as a notebook does, is fine).
    """
    if not (isinstance(cls, type) and issubclass(cls, BaseKernel)):
        raise TypeError(f"register_kernel takes a subclass of BaseKernel, not {shown(cls)}")
    called = cut(cls.__qualname__)
    if not isinstance(cls.kernel_id, str):
        raise TypeError(f"{called}.kernel_id is a string, not {shown(cls.kernel_id)}")
    if not cls.kernel_id or "," in cls.kernel_id:
        raise ValueError(f"{called} needs a kernel_id (without commas)")
    holder = registered.get(cls.kernel_id)
    if holder and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"kernel id {shown(cls.kernel_id)} is taken by {holder.__module__}")
    registered[cls.kernel_id] = cls
    if cls.forms:
        warnings.warn(
            f"{cls.__qualname__}.forms is old: write code", DeprecationWarning, stacklevel=2
        )
    for code in (*cls.code, *cls.forms):
        _above["register_code"](code)
    return cls


#: The group of entry points by which other packages name their kernels.
GROUP = "hf_kernel_patch.kernels"
#: Entry points of this group that gave no kernel -> the reason.
broken_entry_points: dict[str, str] = {}


def register_installed() -> None:
    """Register the kernels of installed packages; warns of each entry point that gives none."""
    for entry in metadata.entry_points(group=GROUP):
        try:
            _register(entry.load())
        except (Exception, SystemExit) as error:  # one package is no reason to lose the others
            package = f" of the package {entry.dist.name}" if entry.dist else ""
            named = f"the entry point {shown(f'{entry.name} = {entry.value}')}{package}"
            reason = cut(f"{type(error).__name__}: {error}")
            broken_entry_points[named] = reason
            warn(f"{named} gives no kernel: {reason}")


def _register(value: object) -> None:
    """What an entry point names: a kernel, or a module that has registered some at its import."""
    if not isinstance(value, ModuleType):
        register_kernel(value)  # type: ignore[type-var]
        return
    package = value.__name__.partition(".")[0]
    if all(one.__module__.partition(".")[0] != package for one in list(registered.values())):
        raise TypeError(f"the module {value.__name__} registers no kernel")

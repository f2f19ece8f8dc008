"""What is installed: made from the original and from all that was asked of it, never from less."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import linecache
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_kernel_patch.kernels import Kernel
from hf_kernel_patch.recognition.edits import CannotRewrite, Edit, edited
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import Leaf, Rule, build, known
from hf_kernel_patch.recognition.measured import site_class
from hf_kernel_patch.recognition.rewriting import rewritten
from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import innermost
from hf_kernel_patch.recognition.wrappers import cells_of_itself, innermost_of, rewrapped

#: A value, the class, module or instance that holds it, and by which name: (owner, name, value).
Located = tuple[Any, str, Any]


@dataclass(frozen=True)
class Request:
    """What is asked of one function: the leaf or rule that serves it, by which kernel, and how.

    ``called`` is, for a leaf that is a function of its own, where the caller is rewritten instead:
    (the module that holds it, its name there, the function). ``measured`` says that a measurement
    may leave calls to the original.
    """

    code: str
    kernel: Kernel
    explicit: bool = False
    options: tuple[tuple[str, object], ...] = ()
    called: Located | None = None
    measured: bool = False


def request(
    code: str,
    kernel: Kernel,
    explicit: bool,
    options: Mapping[str, object],
    called: Located | None = None,
    measured: bool = False,
) -> Request:
    """A Request for a kernel with its own options as they are now, but for those given."""
    every = tuple(sorted({**kernel.options, **options}.items()))
    return Request(code, kernel, explicit, every, called, measured)


class Composed:
    """A function made for some requests, and their sites."""

    def __init__(self, original: Any, function: Any, sites: Mapping[Request, Site]):
        self.original, self.function, self.sites = original, function, sites
        function.__hf_kernel_patch__ = self
        self.itself = cells_of_itself(function)

    def __deepcopy__(self, memo: dict[int, object]) -> Composed:
        # Wrappers that copied the function's attributes, as accelerate's hooks do, are copied with
        # their model.
        return self


# Made once for a function and equal requests, so that patching again costs neither time nor a
# recompilation under torch.compile, and so that many models share one code object.
_made: dict[tuple[object, ...], Composed] = {}


def why_not(original: object, owner: object, request: Request) -> str | None:
    """Why a function cannot be made for a request, or None. ``owner`` holds it."""
    try:
        return _why_not(original, owner, request)
    except CannotRewrite as error:
        return f"{_label(original)} cannot be rewritten: {error}"


def _why_not(original: object, owner: object, request: Request) -> str | None:
    code = known()[request.code]
    if request.called is None and isinstance(code, Leaf):
        return code.why_not(original, owner)
    if isinstance(code, Leaf):
        holder, _, function = request.called  # type: ignore[misc]
        if reason := code.why_not(function, holder):
            return reason
    rule = _call_of(request) if isinstance(code, Leaf) else code
    found = rule.found_in(original, owner)
    if isinstance(found, str):
        return found
    source, places, _ = found
    edited(source, places.edits)
    _wrapped(original, source.value, rewritten(source, (), {}))
    return None


def composed(
    original: object, owner: object, requests: tuple[Request, ...], alone: bool
) -> Composed:
    """The function for requests, each of which ``why_not`` has nothing against.

    ``alone`` says that it is for single models, whose modules the sites then know. The order of
    the requests does not matter; there is one of each leaf or rule.
    """
    ordered = tuple(sorted(requests, key=lambda one: one.code))
    key = id(original), alone, *ordered
    made = _made.get(key)
    if made is None or made.original is not original:
        made = _made[key] = _compose(original, owner, ordered, alone)
    return made


def made_of(original: object) -> list[Composed]:
    """All that was made of an original globally, in force or not."""
    return [made for key, made in list(_made.items()) if made.original is original and not key[1]]


def cells_of_originals() -> set[int]:
    """The ids of the cells of all functions that something was made of, and of what they wrap.

    Where somebody wraps our function and is patched over, such a cell holds our function, and what
    was made of the wrapper is known here even when nobody else has it.
    """
    found: set[int] = set()
    for made in list(_made.values()):
        value = made.original
        while value is not None:
            found.update(map(id, getattr(value, "__closure__", None) or ()))
            value = getattr(value, "__wrapped__", None)
    return found


def _compose(original: Any, owner: object, requests: tuple[Request, ...], alone: bool) -> Composed:
    sites: dict[Request, Site] = {}
    edits: list[Edit] = []
    helpers: dict[str, object] = {}
    source: Function | None = None
    for request in requests:
        code = known()[request.code]
        kind = site_class(request.kernel, request.measured)
        site = kind(request.kernel, original, request.explicit, dict(request.options), alone)
        sites[request] = site
        if isinstance(code, Leaf) and request.called is None:
            adapter: Any = code.adapter_for(original, owner)
            site.swallowed = code.swallowed(innermost(original), owner)
            return Composed(original, build(adapter, site), sites)
        rule = _call_of(request) if isinstance(code, Leaf) else code
        looked = rule.found_in(original, owner, helpers)
        if isinstance(looked, str):
            raise CannotRewrite(looked)
        source, found, helper = looked
        edits += found.edits
        helpers[helper] = rule.serve(site)
    assert source is not None
    label = ", ".join(request.code for request in requests)
    inner = rewritten(source, edits, helpers, label)
    return Composed(original, _wrapped(original, source.value, inner), sites)


def _wrapped(original: object, inner: Any, new: Any) -> Any:
    if not inspect.isfunction(original):
        raise CannotRewrite(f"a {type(original).__qualname__} stands there")
    if innermost_of(original) is not inner:
        raise CannotRewrite("what its wrappers wrap is not the function that runs")
    return rewrapped(original, inner, new)


def _call_of(request: Request) -> Rule:
    from hf_kernel_patch.recognition.rules.leaf_call import leaf_call

    assert request.called is not None
    leaf: Any = known()[request.code]
    return leaf_call(leaf, *request.called)


def difference(made: Composed) -> str:
    """The unified diff from the original's source to the rewritten one; "" for a leaf."""
    before, after = innermost_of(made.original), inspect.unwrap(made.function)
    if not inspect.isfunction(after) or "hf_kernel_patch" not in after.__code__.co_filename:
        return ""
    # The whole files, so that the lines are those of the file.
    old, new = (
        linecache.getlines(one.__code__.co_filename, one.__globals__) for one in (before, after)
    )
    return "".join(difflib.unified_diff(old, new, before.__code__.co_filename, "patched"))


def source_hash(original: object) -> str:
    """The first twelve digits of the SHA-256 of a function's source, or "" where it has none."""
    try:
        lines, _ = inspect.getsourcelines(innermost_of(original).__code__)
    except (AttributeError, OSError, TypeError):
        return ""
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def _label(value: object) -> str:
    return str(getattr(value, "__qualname__", type(value).__qualname__))

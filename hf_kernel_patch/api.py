"""The public functions: patch and unpatch, globally or one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from hf_kernel_patch import registry, settings
from hf_kernel_patch.errors import KernelPatchError, raise_if_blocked, shown, warn
from hf_kernel_patch.kernels import Kernel
from hf_kernel_patch.measuring.measurement import Measurement
from hf_kernel_patch.patching import log, model_patch, watching
from hf_kernel_patch.patching.choosing import (
    activation_of,
    auto_unless_said,
    choose,
    measurement_of,
    report_of,
    why_nothing,
)
from hf_kernel_patch.patching.exclusion import Exclusion, exclusion_of
from hf_kernel_patch.patching.global_patch import Activation
from hf_kernel_patch.patching.ledger import ledger, undo_all
from hf_kernel_patch.patching.own_apply import recorded
from hf_kernel_patch.patching.report import Outcome, PatchReport
from hf_kernel_patch.recognition import site as sites
from hf_kernel_patch.settings import (
    UNSET,
    Config,
    Include,
    Names,
    Options,
)

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")
_standing: Activation | None = None


def patch_transformers(
    include: Include = UNSET,
    *,
    exclude: Names | None = UNSET,
    models: Names = UNSET,
    backend: str = UNSET,
    strict: bool | str = UNSET,
    options: Options = UNSET,
    config: Config = None,
    verbose: bool = False,
) -> PatchReport:
    """Replace code of transformers by fused kernels, for all models, until ``unpatch``.

    Works before or after transformers is imported and before or after models are built. An
    argument left out falls to the environment, then to ``config``, then to the default. A second
    equal call patches what has come since, such as a module that was reloaded; a different one
    takes the place of the first.

    Args:
        include: "auto" or True, the default kernels of this device; "measured", those that pay for
            the model at hand, which the first steps find out; None or False, nothing; otherwise
            kernel ids and op names, as a comma-separated string or an iterable.
        exclude: kernel ids, op names and sites to leave out: "*.LlamaMLP.forward", as the report
            names them, with the wildcards of ``fnmatch``.
        models: "all", or model types such as "llama". Some have a table of what is expected in
            their code; the code of all others is looked for what is known.
        backend: "auto", or "torch", "triton" or "npu" to take kernels of that backend alone.
        strict: raise where a site does not match or a kernel finds no site, instead of warning.
        options: of kernels, {op or kernel id: {option: value}}.
        config: what ``load_kernel_config`` gave, or a path or mapping for it.
        verbose: show the lines of the log from now on, as HF_KERNEL_PATCH_LOG=info does.

    Returns:
        The report: every site considered, patched or skipped with the reason. It is alive:
        sites of modules that are imported later turn from pending to patched.

    Raises:
        ValueError: an unknown kernel, op, model or backend, with the near matches.
        KernelUnavailableError: a kernel or backend asked for by name cannot run here.
        KernelPatchError: with ``strict``, a site does not match or a kernel found no site.
    """
    global _standing
    if verbose:
        log.show()
    made = activation_of(
        *choose(
            config,
            include=include,
            exclude=exclude,
            models=models,
            backend=backend,
            strict=strict,
            options=options,
        )
    )
    if made.kernels:
        watching.prepare()
    with ledger.lock:
        old = _standing
        if old is None or not _same(old, made):
            made.apply()
            _standing = made
            if old is not None:
                raise_if_blocked(old.undo())
            log.tell("%s", report_of(made).summary())
        else:
            old.renew()
            old.look()
        return report_of(_standing or made)


def unpatch(model: nn.Module | None = None) -> None:
    """Put every original back, by identity: of one model, or everything everywhere.

    ``unpatch(model)`` gives back what ``apply_kernel`` and ``apply_default_kernels`` did to that
    model. Doing it twice is fine.

    Raises:
        ForeignPatchError: somebody else has patched over a place of ours; everything else is
            restored, and ours no longer takes effect.
        TypeError: ``model`` is not a transformers model.
    """
    global _standing
    if model is not None:
        model_patch.require_model(model)
        raise_if_blocked(model_patch.release(model))
        return
    with ledger.lock:
        _standing = None
        steps = [model_patch.release, *(one.undo for one in reversed(watching.active))]
        blocked = undo_all(steps)
    raise_if_blocked(blocked)


def apply_kernel(
    kernel_id: str,
    *,
    model: M,
    options: Mapping[str, object] | None = None,
    verbose: bool = False,
) -> M:
    """Apply one kernel to one loaded model and return it; no other model changes.

    A kernel that finds no site in the model warns and returns it as it is. ``options`` are the
    kernel's own, by name; ``verbose`` is as for ``patch_transformers``. Sites that
    HF_KERNEL_PATCH_EXCLUDE names are left out.

    Raises:
        ValueError: the id or an option is unknown; the message has the near matches.
        KernelUnavailableError: the kernel cannot run here; the message says why.
        TypeError: ``model`` is not, and does not wrap, a PreTrainedModel.
    """
    if not isinstance(kernel_id, str):
        raise TypeError(f"kernel_id must be a string, not {shown(kernel_id)}")
    if kernel_id in registry.ops():
        raise ValueError(
            f"{kernel_id!r} is an op, and apply_kernel takes the id of a kernel: name one of "
            + ", ".join(one.kernel_id for one in registry.kernels().values() if one.op == kernel_id)
            + f"; or call apply_default_kernels(model, {kernel_id!r})"
        )
    if kernel_id not in registry.kernels():
        raise registry.unknown_kernel("kernel id", kernel_id, registry.kernels())
    if not isinstance(options, (Mapping, type(None))):
        raise TypeError(
            "options of apply_kernel must map the kernel's options to values, such as "
            f"{{'exact': True}}, not {shown(options)}"
        )
    if verbose:
        log.show()
    given = tuple((kernel_id, name, value) for name, value in (options or {}).items())
    left = exclusion_of(settings.resolve())
    return _apply(model, registry.select((kernel_id,)), True, options=given, exclusion=left)


def apply_default_kernels(
    model: M,
    include_kernels: Include = UNSET,
    *,
    exclude: Names | None = UNSET,
    options: Options = UNSET,
    config: Config = None,
    verbose: bool = False,
) -> M:
    """Apply kernels to one loaded model and return it; no other model changes.

    Args:
        model: a PreTrainedModel, or a module that wraps one.
        include_kernels: "auto" (the default) or True, this device's default kernels; "measured",
            those that pay for this model, which the first steps find out; None or False, nothing;
            otherwise ids, as a comma-separated string or an iterable.
        exclude: as ``patch_transformers`` takes it.
        options: as ``patch_transformers`` takes them.
        config: what ``load_kernel_config`` gave, or a path or mapping for it.
        verbose: as for ``patch_transformers``.

    Raises as ``apply_kernel``.
    """
    if verbose:
        log.show()
    include_kernels = auto_unless_said(include_kernels, config)
    wanted, kernels = choose(
        config, include_kernels=include_kernels, exclude=exclude, options=options
    )
    named, left = isinstance(wanted.include, tuple), exclusion_of(wanted)
    measure = measurement_of(wanted, kernels)
    _apply(model, kernels, named, wanted.models, wanted.options, left, measure)
    if not kernels:
        why = why_nothing(wanted.why_nothing)
        log.tell("one %s: nothing patched: %s", type(model).__name__, why)
    return model


def get_default_kernels() -> list[str]:
    """Ids of the kernels that "auto" takes on this device."""
    return [kernel.kernel_id for kernel in registry.defaults().values()]


def get_available_kernels() -> list[str]:
    """Ids of all kernels that can run here, defaults or not."""
    return registry.available()


def status() -> PatchReport:
    """What is patched now, where, by which kernel, and what is not and why.

    Looks at the moment: a forward that somebody has set on an instance since, a class that was
    patched over or a module that was loaded anew turns its row.
    """
    with ledger.lock:
        for patch in watching.active:
            patch.look()
        for application in model_patch.applications:
            application.look()
        rows = [row for one in watching.active for row in one.rows]
        alive = [one for one in model_patch.applications if one.alive()]
        rows += [row for one in alive for row in one.rows.values()]
    why = why_nothing() if settings.disabled() else "no patch is in force"
    return PatchReport(rows, "" if rows else why)


def require_unpatched(pending: bool = False) -> None:
    """KernelPatchError where something is patched, or nothing can be.

    With ``pending``, a patch of modules that have not been imported may be there.
    """
    if settings.disabled():
        raise KernelPatchError("HF_KERNEL_PATCH_DISABLE is set: nothing can be patched")
    if any(not pending or row.outcome != Outcome.PENDING for row in status()):
        raise KernelPatchError("something is patched already: call unpatch() first")


def count_calls(enabled: bool = True) -> None:
    """Switch on (or off) the counting of calls, served and fallbacks, in reports and status.

    Off by default: it costs a dictionary update a call. HF_KERNEL_PATCH_COUNT=1 switches it on.
    """
    sites.count_calls(enabled)


def capture_decoding(enabled: bool = True) -> None:
    """Switch off (or on) the CUDA graphs by which patched models decode a token.

    On by default; HF_KERNEL_PATCH_CAPTURE=0 switches them off. Without them a model launches its
    kernels one by one; logits differ by rounding.
    """
    sites.capture_decoding(enabled)


def _apply(
    model: M,
    kernels: dict[str, Kernel],
    explicit: bool,
    tables: str | tuple[str, ...] = "all",
    options: model_patch.Options = (),
    exclusion: Exclusion | None = None,
    measure: Measurement | None = None,
) -> M:
    model_patch.require_model(model)
    if settings.disabled():
        return model
    own = {op: kernel for op, kernel in kernels.items() if registry.has_own_apply(kernel)}
    shared = {op: kernel for op, kernel in kernels.items() if op not in own}
    if shared:
        model_patch.patch_model(model, shared, explicit, tables, options, exclusion, measure)
    for kernel in own.values():
        if exclusion is not None and exclusion.patterns:
            warn(
                f"{kernel.kernel_id} patches the model in its own way: exclude of sites does not "
                "reach it"
            )
        with recorded(model, kernel):
            kernel.apply(model=model)
    return model


def _same(one: Activation, other: Activation) -> bool:
    return one.settings == other.settings and one.kernels == other.kernels

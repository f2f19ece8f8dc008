"""What is asked for: arguments over environment over a config over defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_kernel_patch.settings.config import Config, KernelConfig, load_kernel_config
from hf_kernel_patch.settings.environment import (
    PREFIX,
    VARIABLES,
    bisected_environment,
    bisection,
    cache_folder,
    child_environment,
    disabled,
    flag,
    given_variables,
    in_command_line,
    is_rank_zero,
    log_level,
    rank,
    text_of,
    unknown_variables,
    unpatched_environment,
    variable_of,
    variables_unset,
)
from hf_kernel_patch.settings.values import (
    UNSET,
    Include,
    Names,
    Options,
    read,
    read_include,
    text_for,
)

__all__ = [
    "FIELDS",
    "PREFIX",
    "UNSET",
    "VARIABLES",
    "Config",
    "Include",
    "KernelConfig",
    "Names",
    "Options",
    "Settings",
    "bisected_environment",
    "bisection",
    "cache_folder",
    "child_environment",
    "disabled",
    "flag",
    "given_variables",
    "in_command_line",
    "is_rank_zero",
    "load_kernel_config",
    "log_level",
    "rank",
    "read_include",
    "requested_by_environment",
    "resolve",
    "unknown_variables",
    "unpatched_environment",
    "variable_of",
    "variables_for",
    "variables_unset",
]


@dataclass(frozen=True)
class Settings:
    """One resolved request.

    ``include`` is "auto", "measured", None (nothing) or a tuple of kernel ids and op names;
    ``exclude`` is a tuple of these and of patterns of sites; ``models`` is "all" or a tuple of
    architecture names.
    """

    include: str | tuple[str, ...] | None = "auto"
    exclude: tuple[str, ...] = ()
    models: str | tuple[str, ...] = "all"
    backend: str = "auto"
    strict: bool = False
    #: (op or kernel id, option, value), as given.
    options: tuple[tuple[str, str, object], ...] = ()
    #: Where a field was given, for messages, unless it was an argument.
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    #: Why nothing is chosen, where the reason is not plain.
    why_nothing: str = field(default="", compare=False)


#: What an argument, a variable or a config can say.
FIELDS = ("include", "exclude", "models", "backend", "strict", "options")


def resolve(config: Config = None, **arguments: object) -> Settings:
    """Settings from arguments that are not UNSET, else environment, else ``config``, else defaults.

    ``include`` may be given as ``include_kernels``, as some functions and files call it.
    Raises ValueError or TypeError naming the argument or the variable that cannot be read.
    """
    if config is not None and not isinstance(config, KernelConfig):
        config = load_kernel_config(config)
    chosen: dict[str, Any] = {}
    sources: dict[str, str] = {}
    called = {"include": "include_kernels"} if "include_kernels" in arguments else {}
    for name in FIELDS:
        argument = called.get(name, name)
        if arguments.get(argument, UNSET) is not UNSET:
            value, source = arguments[argument], f"the argument {argument}"
        elif value := text_of(name):
            source = sources[name] = f"the variable {variable_of(name)}"
        elif config is not None and getattr(config, name) is not UNSET:
            value = getattr(config, name)
            source = sources[name] = config.source_of(name)
            if name == "include":
                chosen["why_nothing"] = config.why_nothing
        else:
            continue
        chosen[name] = read(name, value, source)
    if disabled():
        chosen["include"] = None
    return replace(Settings(), sources=sources, **chosen)


def variables_for(config: KernelConfig | None, given: Mapping[str, str]) -> dict[str, str]:
    """Field -> text of its variable, for a child: what is ``given``, and what ``config`` says.

    The environment, which the child inherits, wins over the config.
    """
    found = dict(given)
    wanted = resolve(config, **given)
    for name in FIELDS if config is not None else ():
        said = getattr(config, name) is not UNSET
        if said and name not in given and not text_of(name):
            found[name] = text_for(getattr(wanted, name))
    return found


def requested_by_environment() -> bool:
    """Whether HF_KERNEL_PATCH asks for patching at import."""
    return bool(text_of("include")) and resolve().include is not None

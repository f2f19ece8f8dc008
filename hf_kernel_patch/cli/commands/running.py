"""The commands that run a program: run, bisect, demo."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_kernel_patch.cli.commands.app import app, mistakes_told
from hf_kernel_patch.cli.commands.choice import (
    Backend,
    Config,
    Exclude,
    Include,
    Models,
    Options,
    given,
)
from hf_kernel_patch.errors import cut

if TYPE_CHECKING:
    from hf_kernel_patch.settings import KernelConfig


@app.command(
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)
def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="SCRIPT ARGS",
            help="A script, or -m and a module, with its arguments, as for python.",
            show_default=False,
        ),
    ],
    include: Include = None,
    exclude: Exclude = None,
    models: Models = None,
    backend: Backend = None,
    options: Options = None,
    config: Config = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Raise where a row of a table fails. (default: HF_KERNEL_PATCH_STRICT, else warn)",
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write what was patched, and the counts of served calls and fallbacks, to this "
            "JSON file at exit; other processes write beside it. (default: no report)",
            show_default=False,
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            help="Show on stderr what is patched. (default: HF_KERNEL_PATCH_LOG, else silent)",
        ),
    ] = False,
) -> None:
    """Run an unmodified script or module patched, and every Python that it starts."""
    from hf_kernel_patch import settings
    from hf_kernel_patch.cli import autopatch

    chosen = given(
        include=include, exclude=exclude, models=models, backend=backend, options=options
    )
    if strict:
        chosen["strict"] = "1"
    with mistakes_told():
        _check_program(arguments)
        said = settings.variables_for(_check_choice(chosen, config), chosen)
        if report is not None:
            said |= {"report": _report_file(report), "count": "1"}
    if verbose:
        said["log"] = "info"
    autopatch.execute(arguments, said)


@app.command(
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)
def bisect(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="SCRIPT ARGS",
            help="A script, or -m and a module, with its arguments; 'python' before it may stand.",
            show_default=False,
        ),
    ],
    include: Include = None,
    exclude: Exclude = None,
    models: Models = None,
    backend: Backend = None,
    options: Options = None,
    config: Config = None,
    max_runs: Annotated[int, typer.Option(min=2, help="Stop after so many runs.")] = 100,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds after which a run is stopped and counts as wrong. (default: no limit)",
            show_default=False,
        ),
    ] = None,
    show_output: Annotated[
        bool, typer.Option("--show-output", help="Show all that the program prints.")
    ] = False,
) -> None:
    """Find the sites that make a program fail, by running it with ever fewer of them patched.

    The program ends with exit status 0 where its result is right, and with another where not.
    """
    from hf_kernel_patch import settings
    from hf_kernel_patch.cli.bisect import bisect_program, without_python

    chosen = given(
        include=include, exclude=exclude, models=models, backend=backend, options=options
    )
    program = without_python(arguments)
    with mistakes_told():
        _check_program(program)
        said = settings.variables_for(_check_choice(chosen, config), chosen)
        typer.echo(str(bisect_program(program, said, max_runs, timeout, show_output)))


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="llama, qwen2, qwen3 or qwen3_moe.")] = "llama",
    text: Annotated[
        Path | None,
        typer.Option(
            help="A file to learn; by default the documentation of Python's library.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Training steps of each run; by default 100, or what 50 seconds allow.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or npu; by default what is here.", show_default=False),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Where the picture goes: .png, .jpg, .pdf or .svg.")
    ] = Path("hf-kernel-patch-demo.png"),
    seed: Annotated[int, typer.Option(help="Of the weights and of the batches.")] = 0,
) -> None:
    """Train a small model twice, as it is and patched, and compare speed, memory and losses."""
    from hf_kernel_patch.cli.demo import compare

    with mistakes_told():
        compare(model, text, steps, device, output, seed)


def _check_program(arguments: list[str]) -> None:
    """ValueError unless Python would find a script or a module named first."""
    first = arguments[0]
    if first == "-m":
        if len(arguments) < 2:
            raise ValueError("-m needs the name of a module")
    elif first.startswith("-"):
        raise ValueError(f"no such option: {cut(first)}; options of the script go after its name")
    elif not os.path.exists(first):
        command = shutil.which(first)
        hint = f"; for the command of that name write {command}" if command else ""
        raise ValueError(f"no such file: {cut(first)}{hint}")


def _check_choice(chosen: dict[str, str], file: Path | None) -> KernelConfig | None:
    """Raise here, before the program starts, what patching in it would raise.

    Returns what the file says. That nothing will be patched is told, and no mistake.
    """
    from hf_kernel_patch import registry, settings
    from hf_kernel_patch.patching.choosing import choose, load_kernel_config, why_nothing

    config = None if file is None else load_kernel_config(file)
    wanted = settings.resolve(config, **chosen)
    # Whether "auto" finds something is no error, and finding out would import torch.
    idle = wanted.include in ("auto", "measured") and wanted.backend == "auto"
    choose(config, **{**chosen, "include": None} if idle else chosen)
    registry.check_options(wanted.options)
    if wanted.include is None:
        typer.echo(
            f"hf-kernel-patch: nothing is patched: {why_nothing(wanted.why_nothing)}", err=True
        )
    return config


def _report_file(report: Path) -> str:
    """The whole path of the report; OSError where it cannot be written.

    A report of an earlier run is removed: this one may be killed before it writes its own.
    """
    whole = report.absolute()
    if whole.is_dir() or not whole.parent.is_dir():
        raise FileNotFoundError(
            f"--report: {cut(str(whole))} is not a file in a folder that exists"
        )
    if not os.access(whole.parent, os.W_OK):
        raise PermissionError(f"--report: the folder {cut(str(whole.parent))} cannot be written")
    whole.unlink(missing_ok=True)
    return str(whole)

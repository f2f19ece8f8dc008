"""The commands that run a program: run, demo."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_kernel_patch.cli.commands.app import app, mistakes_told


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
    include: Annotated[
        str | None, typer.Option(help="auto, or kernel ids and ops, separated by commas.")
    ] = None,
    models: Annotated[str | None, typer.Option(help="all, or names of architectures.")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, torch, triton or npu.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Raise where a row fails.")] = False,
) -> None:
    """Run an unmodified script or module patched, and every Python that it starts."""
    from hf_kernel_patch.cli import autopatch

    options = {"include": include, "models": models, "backend": backend}
    given = {name: value for name, value in options.items() if value is not None}
    if strict:
        given["strict"] = "1"
    with mistakes_told():
        _check_program(arguments)
        _check_choice(given)
    autopatch.execute(arguments, given)


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
        raise ValueError(f"no such option: {first}; options of the script go after its name")
    elif not os.path.exists(first):
        command = shutil.which(first)
        hint = f"; for the command of that name write {command}" if command else ""
        raise ValueError(f"no such file: {first}{hint}")


def _check_choice(given: dict[str, Any]) -> None:
    """Raise here, before the program starts, what patching in it would raise."""
    from hf_kernel_patch import settings
    from hf_kernel_patch.patching.block import patched

    wanted = settings.resolve(**given)
    # Whether "auto" finds something is no error, and finding out would import torch.
    idle = wanted.include == "auto" and wanted.backend == "auto"
    patched(**{**given, "include": None} if idle else given)

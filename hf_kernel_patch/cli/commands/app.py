"""What all commands share: the application, and how a user's mistake is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from hf_kernel_patch import settings
from hf_kernel_patch.errors import KernelPatchError
from hf_kernel_patch.version import __version__

app = typer.Typer(
    name="hf-kernel-patch",
    help="Fused kernels for Hugging Face models, put in place and taken back exactly.",
    no_args_is_help=True,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    for text in settings.unknown_variables():
        typer.echo(f"hf-kernel-patch: {text}", err=True)


@contextmanager
def mistakes_told() -> Iterator[None]:
    """A user's mistake as one line on stderr: exit code 2 for usage, 1 for what cannot be done."""
    try:
        yield
    except (ValueError, TypeError) as error:
        _fail(error, 2)
    except (KernelPatchError, OSError) as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> NoReturn:
    typer.echo(f"hf-kernel-patch: {error}", err=True)
    raise typer.Exit(code)

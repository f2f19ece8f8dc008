"""The command line: list, table, status, diff, run, doctor, demo."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hf_kernel_patch import registry
from hf_kernel_patch.cli.printing import (
    print_diff,
    print_json,
    print_report,
    print_table,
    progress_bar,
)
from hf_kernel_patch.errors import KernelPatchError
from hf_kernel_patch.version import __version__

app = typer.Typer(
    name="hf-kernel-patch",
    help="Fused kernels for Hugging Face models, put in place and taken back exactly.",
    no_args_is_help=True,
    add_completion=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def main() -> None:
    """The entry point."""
    app()


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
    pass


@app.command("list")
def list_kernels(
    as_json: Json = False,
    models: Annotated[
        bool, typer.Option("--models", help="The model families and their ops instead.")
    ] = False,
) -> None:
    """The kernels: op, device, backend, and whether each runs here or why not."""
    if models:
        return _list_families(as_json)
    with _mistakes_told():
        defaults = {kernel.kernel_id for kernel in registry.defaults().values()}
        found = [
            {
                "kernel_id": kernel.kernel_id,
                "op": kernel.op,
                "device": kernel.device,
                "backend": kernel.backend,
                "default": kernel.kernel_id in defaults,
                "unavailable": registry.unavailable(kernel),
            }
            for kernel in registry.kernels().values()
        ]
    if as_json:
        return print_json(found)
    print_table(
        ("kernel", "op", "device", "backend", "default", "available"),
        [
            (
                *(str(one[key]) for key in ("kernel_id", "op", "device", "backend")),
                "yes" if one["default"] else "",
                f"no: {one['unavailable']}" if one["unavailable"] else "yes",
            )
            for one in found
        ],
    )


def _list_families(as_json: bool) -> None:
    from hf_kernel_patch.cli.families import found_in_families

    with _mistakes_told(), progress_bar("Looking at the code of transformers") as told:
        found = found_in_families(told)
    if as_json:
        return print_json(found)
    rows = [
        (family, ", ".join(one["ops"]) or one["failed"] or "-", "yes" if one["listed"] else "")
        for family, one in found.items()
    ]
    print_table(("family", "ops", "table"), rows)
    served = sum(bool(one["ops"]) for one in found.values())
    typer.echo(f"{served} of {len(found)} families have code that is known")


@app.command()
def table(
    target: Annotated[
        str, typer.Argument(metavar="MODEL_DIR|MODEL_TYPE", help="Whose code.", show_default=False)
    ],
) -> None:
    """The patch table of a model, found in its code where it has none, as Python."""
    from hf_kernel_patch.cli.families import table_of

    with _mistakes_told():
        typer.echo(table_of(target))


@app.command()
def status(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL_DIR|MODEL_TYPE]",
            help="A saved model's directory or a model type; every architecture by default.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """What would be patched by the environment and the defaults, site by site."""
    from hf_kernel_patch.cli.preview import preview

    with _mistakes_told():
        report = preview(target)
    if as_json:
        return print_json(report.as_dict())
    print_report(report)


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
    with _mistakes_told():
        _check_program(arguments)
        _check_choice(given)
    autopatch.execute(arguments, given)


@app.command()
def diff(
    target: Annotated[
        str, typer.Argument(metavar="MODEL_DIR|MODEL_TYPE", help="Whose code.", show_default=False)
    ],
    site: Annotated[
        str,
        typer.Argument(help="Only sites whose name contains this, such as DecoderLayer."),
    ] = "",
    include: Annotated[
        str, typer.Option(help="Kernel ids and ops, separated by commas; every op by default.")
    ] = "",
) -> None:
    """What becomes of a model's code: the unified diff of every function that is rewritten."""
    from hf_kernel_patch.cli.diff import differences

    with _mistakes_told():
        for row in differences(target, site, include):
            print_diff(row)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, sites that are missing and why, foreign patches; exit 1 where one is."""
    from hf_kernel_patch.cli.doctor import examine

    with _mistakes_told():
        found = examine()
    skipped = [row for row in found["tables"] if row["reason"]]
    if as_json:
        print_json(found)
        raise typer.Exit(int(bool(skipped)))
    print_table(("package", "version"), [(k, v or "-") for k, v in found["versions"].items()])
    print_table(
        ("device", "name", "in use"),
        [(one["device"], one["name"], "yes" if one["current"] else "") for one in found["devices"]],
    )
    typer.echo(
        f"tables: {len(found['tables'])} rows, {len(skipped)} would be skipped; "
        f"foreign patches: {len(found['foreign'])}"
    )
    for row in skipped:
        typer.echo(f"  skipped {row['site']}: {row['reason']}")
    for one in found["foreign"]:
        typer.echo(f"  foreign {one['site']} is {one['by']}: {one['effect']}")
    if found["newer"]:
        typer.echo(found["newer"])
    raise typer.Exit(int(bool(skipped)))


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

    with _mistakes_told():
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
    from hf_kernel_patch.api import patched

    wanted = settings.resolve(**given)
    # Whether "auto" finds something is no error, and finding out would import torch.
    idle = wanted.include == "auto" and wanted.backend == "auto"
    patched(**{**given, "include": None} if idle else given)


@contextmanager
def _mistakes_told() -> Iterator[None]:
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

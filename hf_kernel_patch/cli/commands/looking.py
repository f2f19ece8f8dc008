"""The commands that look and change nothing: list, table, status, diff, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_kernel_patch import registry
from hf_kernel_patch.cli.commands.app import app, mistakes_told
from hf_kernel_patch.cli.printing import (
    print_diff,
    print_json,
    print_report,
    print_table,
    progress_bar,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


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
    with mistakes_told():
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

    with mistakes_told(), progress_bar("Looking at the code of transformers") as told:
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

    with mistakes_told():
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

    with mistakes_told():
        report = preview(target)
    if as_json:
        return print_json(report.as_dict())
    print_report(report)


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

    with mistakes_told():
        for row in differences(target, site, include):
            print_diff(row)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, sites that are missing and why, foreign patches; exit 1 where one is."""
    from hf_kernel_patch.cli.doctor import examine

    with mistakes_told():
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

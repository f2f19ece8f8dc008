"""The commands that look and change nothing: list, table, status, diff, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_kernel_patch import registry
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
from hf_kernel_patch.cli.printing import (
    print_diff,
    print_json,
    print_lines,
    print_report,
    print_table,
    progress_bar,
    terminal_width,
    waiting,
)

A_MODEL = "A saved model's folder, a model type, or a name on the Hub that is in the local cache"
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
        tried = {kernel.kernel_id for kernel in registry.tried().values()}
        found = [
            {
                "kernel_id": kernel.kernel_id,
                "op": kernel.op,
                "device": kernel.device,
                "backend": kernel.backend,
                "default": kernel.kernel_id in defaults,
                "measured": kernel.kernel_id in tried,
                "unavailable": registry.unavailable(kernel),
            }
            for kernel in registry.kernels().values()
        ]
    if as_json:
        return print_json(found)
    # In a terminal a reason is told once, below the table, and not in a column of a few characters.
    reasons: dict[str, list[str]] = {}
    rows = []
    for one in found:
        why = one["unavailable"]
        if why and terminal_width():
            reasons.setdefault(str(why), []).append(str(one["kernel_id"]))
        available = "yes" if not why else "no" if terminal_width() else f"no: {why}"
        cells = (str(one[key]) for key in ("kernel_id", "op", "device", "backend"))
        default = "yes" if one["default"] else "if measured" if one["measured"] else ""
        rows.append((*cells, default, available))
    print_table(("kernel", "op", "device", "backend", "default", "available"), rows, group=1)
    print_lines(*(f"\nnot available ({why}): {', '.join(ids)}" for why, ids in reasons.items()))


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
    target: Annotated[str, typer.Argument(metavar="MODEL", help=f"{A_MODEL}.", show_default=False)],
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
            metavar="MODEL",
            help=f"{A_MODEL}. (default: every architecture)",
            show_default=False,
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    models: Models = None,
    backend: Backend = None,
    options: Options = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """What would be patched, site by site, by these options, the environment and the defaults."""
    from hf_kernel_patch.cli.preview import preview

    chosen = given(
        include=include, exclude=exclude, models=models, backend=backend, options=options
    )
    with mistakes_told():
        report = preview(target, config, **chosen)
    if as_json:
        return print_json(report.as_dict())
    print_report(report)


@app.command()
def diff(
    target: Annotated[str, typer.Argument(metavar="MODEL", help=f"{A_MODEL}.", show_default=False)],
    site: Annotated[
        str,
        typer.Argument(
            help="Only sites whose name contains this, such as DecoderLayer. (default: every site)"
        ),
    ] = "",
    include: Annotated[
        str, typer.Option(help="Kernel ids and ops, separated by commas. (default: every op)")
    ] = "",
) -> None:
    """What becomes of a model's code: the unified diff of every function that is rewritten."""
    from hf_kernel_patch.cli.diff import differences

    with mistakes_told():
        for row in differences(target, site, include):
            print_diff(row)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, what works with it, sites that are missing, patches by others.

    The exit status is 1 where torch, transformers or a site that a table expects is missing.
    """
    from hf_kernel_patch.cli.doctor import examine

    with mistakes_told(), waiting("Importing what the tables describe"):
        found = examine()
    skipped = [row for row in found["tables"] if row["reason"]]
    failed = int(bool(skipped or found["problems"]))
    if as_json:
        print_json(found)
        raise typer.Exit(failed)
    print_table(("package", "version"), [(k, v or "-") for k, v in found["versions"].items()])
    print_table(
        ("device", "name", "in use"),
        [(one["device"], one["name"], "yes" if one["current"] else "") for one in found["devices"]],
    )
    kernels = found["kernels"]
    print_lines(
        f"kernels: {len(kernels['available'])} of {len(kernels['all'])} can run here, as "
        "hf-kernel-patch list shows; auto takes "
        + (", ".join(kernels["default"]) or "none on this device"),
        *found["problems"],
    )
    if not found["problems"]:
        print_lines(
            f"tables: {len(found['tables'])} rows, {len(skipped)} would be skipped; "
            f"foreign patches: {len(found['foreign'])}",
            *(f"  skipped {row['site']}: {row['reason']}" for row in skipped),
            *(
                f"  foreign {one['site']} is {one['by']}: {one['effect']}"
                for one in found["foreign"]
            ),
        )
    if found["newer"]:
        print_lines(found["newer"])
    raise typer.Exit(failed)

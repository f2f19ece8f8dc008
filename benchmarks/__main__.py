"""``python -m benchmarks``: measure ops and models, and make pages and pictures of the results."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import hf_kernel_patch
from benchmarks.measure import cases, convergence, discovery, e2e, imports, launch
from benchmarks.measure.environment import DTYPES, default_device, default_dtype, header, slug
from benchmarks.measure.timing import limits, reason
from benchmarks.report import commands, decoding, results, tables
from benchmarks.workloads import models, shapes, variants
from benchmarks.workloads.ops import OPS

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(commands.report)
app.command()(commands.summary)
console = Console(width=140, highlight=False)

Device = Annotated[str, typer.Option(help="cuda, cpu, ...; the accelerator by default")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; bf16, on a CPU fp32, by default")]
Out = Annotated[Path | None, typer.Option(help="folder of the results")]
Only = Annotated[str, typer.Option(help="comma-separated providers, or variants, to measure")]
Quick = Annotated[bool, typer.Option("--quick", help="tiny shapes, to see that all runs")]
Model = Annotated[str, typer.Argument(help=", ".join(models.names()))]
Layers = Annotated[int | None, typer.Option(help="layers instead of the model's own")]
Include = Annotated[str, typer.Option(help="what to patch: auto, or kernel ids and op names")]
Limit = Annotated[float, typer.Option(help="seconds for one variant")]


@app.callback()
def guard() -> None:
    """Measures ops and whole models against the peers that are installed."""
    if hf_kernel_patch.status().rows:
        raise typer.BadParameter("transformers is patched already: unset HF_KERNEL_PATCH")


@app.command()
def ops(
    names: Annotated[list[str] | None, typer.Argument(help=", ".join(OPS))] = None,
    device: Device = "",
    dtype: Dtype = "",
    quick: Quick = False,
    out: Out = None,
    only: Only = "",
    shape: Annotated[str, typer.Option(help="only shapes whose label contains this")] = "",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
    launches: Annotated[bool, typer.Option("--launch", help="host time of a call instead")] = False,
    limit: Annotated[float, typer.Option(help="seconds after which no shape is begun")] = 540.0,
) -> None:
    """Every op, or the named ones: time, share of the limit, memory and error, by shape."""
    begin = time.monotonic()
    for name in names or ():
        _known(name, OPS)
    device = _device(device)
    dtype = _dtype(dtype, device)
    wanted = [c for c in shapes.cases(device, quick, launches) if not names or c.op in names]
    wanted = [case for case in wanted if shape in case.label]
    torch.manual_seed(0)
    result = header("launch" if launches else "ops", device, dtype)
    result |= {"absent": {}, "skipped": [], "rows": []}
    if not launches:
        result["limits"] = limits(device, DTYPES[dtype], quick)
    label = ["launch"] * launches + (names or ["ops"]) + ["quick"] * quick
    folder, file = _folder(out, device), slug("-".join(label))
    for case in wanted:
        if time.monotonic() - begin > limit:
            result["skipped"].append(f"{case.op} {case.label}")
            continue
        began = time.monotonic()
        rows, absent = _case(result, case, device, DTYPES[dtype], only, compiled, quick, launches)
        took = time.monotonic() - began
        result["absent"].setdefault(case.op, {}).update(absent)
        result["rows"] += [{**row, "case_s": round(took, 1)} for row in rows]
        results.write(result, folder, file)
        console.print(f"{case.op} {case.label}: {took:.1f} s", style="dim")
    _show(result, folder / f"{file}.json")


def _case(
    result: dict[str, Any],
    case: shapes.Case,
    device: str,
    dtype: torch.dtype,
    only: str,
    compiled: bool,
    quick: bool,
    launches: bool,
) -> tuple[list[cases.Row], dict[str, str]]:
    builders, absent = cases.providers(case, device, compiled and case.compiled)
    if only:
        builders = {name: made for name, made in builders.items() if name in only.split(",")}
    try:
        if launches:
            return launch.run(case, builders, device, dtype, batches=2 if quick else 15), absent
        seconds = 0.002 if quick else 0.3
        return cases.run(case, builders, device, dtype, result["limits"], seconds), absent
    except Exception as error:  # the inputs do not fit, or a provider broke the device
        row = {"op": case.op, "case": case.label, "phase": "inputs", "provider": "all"}
        return [row | {"error": reason(error)}], absent


@app.command("e2e")
def training(
    model: Model,
    device: Device = "",
    dtype: Dtype = "",
    quick: Quick = False,
    out: Out = None,
    only: Only = "",
    include: Include = "auto",
    without_loss: Annotated[
        bool, typer.Option("--without-loss", help="the loss stays transformers' own")
    ] = False,
    adamw: Annotated[bool, typer.Option("--adamw", help="the optimizer's step too")] = False,
    layers: Layers = None,
    batch: int | None = None,
    length: int | None = None,
    steps: int | None = None,
    limit: Limit = 400.0,
) -> None:
    """A training step of a model, forward and backward, in every variant."""
    sizes = {"batch": batch, "length": length, "steps": steps}
    options = {"include": include, "loss_left": without_loss, "adamw": adamw, "limit": limit}
    _model("e2e", model, device, dtype, quick, out, only, layers, options | sizes)


@app.command()
def decode(
    model: Model,
    device: Device = "",
    dtype: Dtype = "",
    quick: Quick = False,
    out: Out = None,
    only: Only = "",
    include: Include = "auto",
    layers: Layers = None,
    batch: Annotated[
        list[str] | None, typer.Option(help="sequences at once: 32, or 1,8,32, or several times")
    ] = None,
    prompt: Annotated[int | None, typer.Option(help="tokens before the first decoded one")] = None,
    new: Annotated[int | None, typer.Option(min=2, help="tokens to decode")] = None,
    limit: Limit = 400.0,
) -> None:
    """Greedy decoding by ``generate``: milliseconds a token, in every variant and at each batch."""
    sizes = {"prompt": prompt, "new": new}
    options = {"include": include, "limit": limit, "batches": _numbers(batch or [])}
    _model("decode", model, device, dtype, quick, out, only, layers, options | sizes)


def _model(
    kind: str,
    model: str,
    device: str,
    dtype: str,
    quick: bool,
    out: Path | None,
    only: str,
    layers: int | None,
    options: dict[str, Any],
) -> None:
    _known(model, models.names())
    chosen = tuple(filter(None, only.split(",")))
    for name in chosen:
        _known(name, variants.names(kind))
    device = _device(device)
    result, path = e2e.run(
        kind,
        model,
        device,
        _dtype(dtype, device),
        _folder(out, device),
        quick=quick,
        layers=layers,
        only=chosen,
        told=lambda row: console.print(f"{row['variant']}, {row['batch']}: done", style="dim"),
        **options,
    )
    _show(result, path)


@app.command("convergence")
def learning(
    device: Device = "",
    dtype: Dtype = "",
    quick: Quick = False,
    out: Out = None,
    steps: int | None = None,
) -> None:
    """Loss curves of small models on real text, patched and not, and how far they lie apart."""
    device = _device(device)
    dtype = _dtype(dtype, device)
    given = convergence.sizes(device, quick) | ({} if steps is None else {"steps": steps})
    result = header("convergence", device, dtype)
    result["rows"] = convergence.run(
        device,
        dtype,
        given,
        told=lambda row: console.print(
            f"{row['case']}, {row['variant']}: {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}, "
            f"from eager {row['largest']:.1e} at most, {row['mean']:.1e} on average"
        ),
    )
    console.print(results.write(result, _folder(out, device), slug(f"convergence {dtype}")))


@app.command("imports")
def import_time(quick: Quick = False, out: Out = None) -> None:
    """The time that importing hf_kernel_patch takes, beside an empty Python."""
    result = header("imports", "cpu", "") | {"rows": [imports.measure(2 if quick else 15)]}
    path = results.write(result, _folder(out, "cpu"), "imports")
    row = result["rows"][0]
    console.print(f"import hf_kernel_patch: {row['statement_ms']:.1f} ms, ", end="")
    console.print(f"{row['more_ms']:.1f} ms more than an empty process; heavy: {row['heavy']}")
    console.print(path)


@app.command("discovery")
def discovery_time(quick: Quick = False, out: Out = None) -> None:
    """What looking for known code costs, by module and in the whole of transformers."""
    result = header("discovery", "cpu", "") | {"rows": [discovery.measure(3 if quick else None)]}
    path = results.write(result, _folder(out, "cpu"), "discovery")
    row = result["rows"][0]
    console.print(f"{row['median_ms']:.0f} ms in the median, at most {row['largest_ms']:.0f} ms")
    console.print(path)


def _show(result: dict[str, Any], path: Path) -> None:
    """The tables, what failed, and where the numbers are."""
    rows = result["rows"]
    decoded = result["kind"] == "decode"
    for table in decoding.tables_of(rows) if decoded else tables.of(result):
        console.print(table)
    for line in tables.failures(rows):
        console.print(f"failed: {line}")
    versions = " ".join(f"{name} {found}" for name, found in result["versions"].items())
    console.print(f"{result['device']['name']}, {result['dtype']}; {versions}")
    if "limits" in result:
        copy, rate = result["limits"]["copy_gbs"], result["limits"]["matmul_tflops"]
        console.print(f"limits: copy {copy:.0f} GB/s, matrix product {tables.number(rate)} TFLOP/s")
    if result.get("changes"):
        console.print(f"cut for this device: {result['changes']}")
    if result.get("skipped"):
        console.print(f"out of time, not measured: {len(result['skipped'])} shapes")
    console.print(path)


def _known(name: str, names: Any) -> None:
    if name not in names:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(names)}")


def _numbers(texts: list[str]) -> tuple[int, ...]:
    """The different numbers of options that may hold several, in their order."""
    parts = [part for text in texts for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise typer.BadParameter(f"{part!r} is no number of sequences")
    return tuple(dict.fromkeys(map(int, parts)))


def _device(name: str) -> str:
    found = default_device()
    if name and name not in ("cpu", found):
        raise typer.BadParameter(f"no {name} device here, but {found}")
    return name or found


def _dtype(name: str, device: str) -> str:
    if name:
        _known(name, DTYPES)
    return name or default_dtype(device)


def _folder(out: Path | None, device: str) -> Path:
    return out or Path("benchmarks/results") / slug(header("", device, "")["device"]["name"])


if __name__ == "__main__":
    app()

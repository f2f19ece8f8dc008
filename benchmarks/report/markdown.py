"""RESULTS.md from the results: a section a device and subject, with its chart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure.environment import slug
from benchmarks.report import charts, decoding, tables

Row = dict[str, Any]
PREAMBLE = """\
# Results

Made by `python -m benchmarks report`; do not edit. Times are medians of rounds in which all
providers take turns. A share is of the limit measured in the same run: the fewest bytes that the
op has to move over the copy bandwidth (read plus write), or its operations over the rate of a
matrix product, whichever takes longer. Phases: "forward" records gradients, "inference" does not,
"backward" is the backward alone, "step" is both. Errors are ||out - ref|| / ||ref|| against
float64, the largest over all shapes. Inputs are random; an accelerator's cache is overwritten
before every timed call, for so long that the host has queued the call: times are the device's, and
the host's are those of "launch". Kernel ids are ours; "patched" is the original of transformers
with that kernel in its place.
"""


def write(sections: dict[tuple[str, str], dict[str, Any]], into: Path) -> list[Path]:
    """Write the sections into the file, in place of older ones of the same title; what was written.

    Sections of other devices and subjects stay as they are.
    """
    texts = _read(into)
    written = []
    for (device, subject), section in sections.items():
        title = f"{device}: {subject}"
        chart = into.parent / "charts" / f"{slug(title)}.png"
        rows = list(section["rows"].values())
        text = [*_about(rows), *_BODIES[section["kind"]](rows)]
        if drawn := charts.draw(section["kind"], title, rows, chart):
            text += [*_picture(title, *(one.relative_to(into.parent) for one in drawn)), ""]
            written += drawn
        texts[title] = "\n".join(text)
    into.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join(f"## {title}\n\n{text.strip()}\n" for title, text in texts.items())
    into.write_text(f"{PREAMBLE}\n{body}")
    return [into, *written]


def _picture(title: str, light: Path, dark: Path) -> list[str]:
    """A picture that follows the page's colours."""
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark.as_posix()}">',
        f'  <img alt="{title}" src="{light.as_posix()}">',
        "</picture>",
    ]


def _read(path: Path) -> dict[str, str]:
    """The sections of a file by title; none where there is no file."""
    if not path.exists():
        return {}
    _, *parts = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)
    return dict(part.split("\n", 1) for part in parts)


def _about(rows: list[Row]) -> list[str]:
    """When, with what and how the rows were measured."""
    lines = []
    for run in {row["run"]["date"]: row["run"] for row in rows}.values():
        found = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        line = f"- {run['date'][:10]}, {run['dtype']}: `{run['command']}`; {found}"
        if limits := run.get("limits"):
            rate = tables.number(limits["matmul_tflops"])
            line += f"; copy {limits['copy_gbs']:.0f} GB/s, matrix product {rate} TFLOP/s"
        if run.get("changes"):
            line += f"; cut for this device: {run['changes']}"
        if run.get("note"):
            line += f"; {run['note']}"
        lines.append(line)
    return [*lines, ""]


def _ops(rows: list[Row]) -> Iterable[str]:
    names = tables.columns(rows)
    groups = tables.grouped(rows)
    yield from _table(
        ["shape", "phase", *names],
        [
            [case, phase, *(_measured(found[name]) if name in found else "" for name in names)]
            for (case, phase), found in groups.items()
        ],
    )
    yield from _memory(names, groups)
    yield from _errors(names, rows)
    yield from _notes(rows)


def _launch(rows: list[Row]) -> Iterable[str]:
    ops = tables.columns(rows, "op")
    yield "Host time of one call at one token without gradients (on a CPU, its whole time)."
    yield ""
    for op in ops:
        chosen = [row for row in rows if row["op"] == op]
        names = tables.columns(chosen)
        cells = [tables.cell(row) for row in chosen]
        yield from _table([op, *names], [[chosen[0]["case"], *cells]])
    yield from _notes(rows)


def _steps(rows: list[Row]) -> Iterable[str]:
    named = ["layers", "batch", "length", "step", "loss_of"]
    yield from _table(
        [*named, "variant", "tokens/s", "peak GiB", "first call", "loss, gradient norm"],
        [
            [*(str(row[key]) for key in named), row["variant"], *tables.step_cells(row)]
            for row in rows
        ],
    )
    yield from _patches(rows)


def _decoding(rows: list[Row]) -> Iterable[str]:
    rows = sorted(rows, key=lambda row: (row["layers"], row["prompt"], row["batch"]))
    yield from _table(*decoding.filled(rows))
    yield from decoding.explained(rows)
    yield from (f"- failed: {line}" for line in tables.failures(rows))
    missing: dict[str, str] = {}
    for row in rows:
        missing |= row["run"].get("absent", {})
    measured = {row["variant"] for row in rows}
    yield from (f"- {name}: {why}" for name, why in missing.items() if name not in measured)
    yield from _patches(rows)


def _patches(rows: list[Row]) -> Iterable[str]:
    patches = [f"- {row['variant']}: {row['patch']}" for row in rows if row.get("patch")]
    yield from dict.fromkeys(patches)
    yield ""


def _imports(rows: list[Row]) -> Iterable[str]:
    row = rows[-1]
    heavy = ", ".join(row["heavy"]) or "none"
    yield f"`import hf_kernel_patch` takes {row['statement_ms']:.1f} ms; the process takes"
    yield f"{row['more_ms']:.1f} ms more than an empty Python. Of torch, transformers and triton it"
    yield f"imports {heavy}."
    yield ""
    yield from _table(
        ["module", "own us", "with what it imports, us"],
        [[one["module"], str(one["self_us"]), str(one["cumulative_us"])] for one in row["slowest"]],
    )


def _discovery(rows: list[Row]) -> Iterable[str]:
    row = rows[-1]
    yield f"Known code is looked for in {row['median_ms']:.0f} ms of CPU time a modelling module in"
    yield f"the median, after an import of {row['import_median_ms']:.0f} ms, and in"
    yield f"{row['largest_ms']:.0f} ms at most, of {row['looked_at']} modules;"
    yield f"{row['modules'] - row['looked_at']} more could not be imported."
    yield ""
    yield from (f"- `{one['module']}`: {one['ms']:.0f} ms" for one in row["slowest"])
    yield ""
    for label, spent in zip(("at first", "again, from its cache"), row["list_s"]):
        yield f"- `hf-kernel-patch list --models` {label}: {spent['wall']:.1f} s, of which CPU"
        yield f"  {spent['cpu']:.1f} s"
    yield ""


def _convergence(rows: list[Row]) -> Iterable[str]:
    first = rows[0]
    yield (
        f"{first['steps']} steps of AdamW on {first['batch']} x {first['length']} bytes of the "
        "documentation of Python's library; distances are of the losses from the eager run's, step "
        "by step."
    )
    yield ""
    yield from _table(
        ["model", "run", "first loss", "mean of the last ten", "largest distance", "mean distance"],
        [
            [
                row["case"],
                row["variant"],
                f"{row['losses'][0]:.4f}",
                f"{sum(row['losses'][-10:]) / len(row['losses'][-10:]):.4f}",
                f"{row['largest']:.1e}",
                f"{row['mean']:.1e}",
            ]
            for row in rows
        ],
    )
    yield from (f"- {row['case']}: {row['patch']}" for row in rows if row.get("patch"))
    yield ""


_BODIES = {
    "convergence": _convergence,
    "ops": _ops,
    "launch": _launch,
    "e2e": _steps,
    "decode": _decoding,
    "imports": _imports,
    "discovery": _discovery,
}


def _measured(row: Row) -> str:
    if row["error"]:
        return "failed"
    rate = f"{row['gbs']:.0f} GB/s"
    if row["bound"] == "operations":
        rate = f"{tables.number(row['tflops'])} TFLOP/s"
    return f"{tables.seconds(row['median_s'])}, {rate}, **{row['share']:.0%}**"


def _memory(names: list[str], groups: dict[tuple[str, str], dict[str, Row]]) -> Iterable[str]:
    """Extra peak memory, where it was measured."""
    rows = [
        [case, phase, *(_mib(found.get(name)) for name in names)]
        for (case, phase), found in groups.items()
        if any(row.get("memory_mib") is not None for row in found.values())
    ]
    if rows:
        yield "Peak memory over that of the inputs, in MiB (a backward with its forward):"
        yield ""
        yield from _table(["shape", "phase", *names], rows)


def _mib(row: Row | None) -> str:
    value = (row or {}).get("memory_mib")
    return "" if value is None else tables.number(value)


def _errors(names: list[str], rows: list[Row]) -> Iterable[str]:
    """The largest error of every output and gradient, by provider."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for what, error in row.get("errors", {}).items():
            before = found.setdefault(what, {}).get(row["provider"], 0.0)
            found[what][row["provider"]] = error if error != error else max(before, error)
    yield from _table(
        ["error of", *names],
        [
            [what, *(f"{by[name]:.1e}" if name in by else "" for name in names)]
            for what, by in found.items()
        ],
    )


def _notes(rows: list[Row]) -> Iterable[str]:
    """Who writes over inputs, who failed, and who is not here."""
    written: dict[str, set[str]] = {}
    for row in rows:
        if row.get("overwrites"):
            written.setdefault(row["provider"], set()).update(row["overwrites"])
    for name, inputs in written.items():
        yield f"- {name} writes over its inputs: {', '.join(sorted(inputs))}"
    yield from (f"- failed: {line}" for line in tables.failures(rows))
    missing: dict[str, str] = {}
    for row in rows:
        missing |= row["run"].get("absent", {}).get(row["op"], {})
    yield from (f"- {name} is not measured: {why}" for name, why in missing.items())
    yield ""


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows), ""]

"""What is shown outside of RESULTS.md, from the same results: the README's picture, and the figures
that the demo quotes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import charts, tables
from hf_kernel_patch.cli import pictures
from hf_kernel_patch.cli.pictures import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Sections = dict[tuple[str, str], dict[str, Any]]
#: (layers, batch, length of text) -> variant -> row.
Groups = dict[tuple[int, ...], dict[str, Row]]
#: What the picture is of: one card, for figures of different cards are not to be compared.
GPU = "NVIDIA H100 80GB HBM3"
#: At most so many models stand side by side.
MOST = 3
#: Variants of the picture; those that are left out are in RESULTS.md.
SHOWN = ("eager", "grouped_mm", "liger", "compile", "ours")
TITLES = {
    "llama-3.1-8b": "Llama-3.1-8B",
    "llama-3.2-1b": "Llama-3.2-1B",
    "qwen2.5-1.5b": "Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
}
#: Of a cell's rows what the demo shows.
_FIGURES = {"e2e": ("tokens_per_s", "peak_gib"), "decode": ("ms_per_token",)}


def cells(sections: Sections) -> Iterator[dict[str, Any]]:
    """For each GPU, model and size: what was measured as it is and patched, where both were."""
    found = _by_model(sections)
    # By GPU and model, training first.
    for gpu, kind, model in sorted(found, key=lambda key: (key[0], key[2], key[1] != "e2e")):
        for (layers, batch, length), rows in sorted(found[gpu, kind, model].items()):
            base, ours = _base(rows), rows["ours"]
            sides = {"as_it_is": rows[base], "patched": ours}
            yield {
                "gpu": gpu,
                "model": model,
                "kind": kind,
                "layers": layers,
                "batch": batch,
                "prompt" if kind == "decode" else "length": length,
                "baseline": base,
                **{name: {k: row[k] for k in _FIGURES[kind]} for name, row in sides.items()},
                "date": ours["run"]["date"][:10],
                "transformers": ours["run"]["versions"]["transformers"],
                "decode_attention": _has_whole_tokens(ours),
            }


def write_cells(sections: Sections, path: Path) -> None:
    """Write the cells as the demo reads them."""
    path.write_text(json.dumps(list(cells(sections)), indent=1) + "\n", encoding="utf-8")


def pictured(sections: Sections) -> list[str]:
    """The models of the picture: those whose training was measured on its GPU."""
    found = _by_model(sections)
    return [name for name in TITLES if found.get((GPU, "e2e", name))][:MOST]


def write_picture(sections: Sections, path: Path) -> list[Path]:
    """Write the README's picture, light and dark; nothing where nothing was measured on its GPU."""
    names = pictured(sections)
    return charts.save(path, lambda theme: _drawn(sections, names, theme)) if names else []


def _drawn(sections: Sections, names: list[str], theme: Theme) -> Figure:
    """Models side by side; below each other speed of training, its memory, decoding."""
    found = _by_model(sections)
    card = GPU.partition(" 80GB")[0]
    words = f"One {card}, bfloat16; ratios are to transformers as it is"
    figure = pictures.figure(theme, 5.2 * len(names), 6.8, words)
    panels = figure.subplots(3, len(names), squeeze=False, height_ratios=(5, 5, 6))
    for column, name in enumerate(names):
        training, decoding = found[GPU, "e2e", name], found.get((GPU, "decode", name), {})
        for row, (what, groups) in enumerate(
            {"speed": training, "memory": training, "token": decoding}.items()
        ):
            head = f"{TITLES[name]}: {_WORDS[what]}"
            _panel(panels[row][column], theme, head, groups, what)
    return figure


_WORDS = {
    "speed": "training, tokens a second",
    "memory": "training, peak memory",
    "token": "decoding, time of a token",
}


def _panel(axes: Axes, theme: Theme, title: str, groups: Groups, what: str) -> None:
    if not groups:
        pictures.dress(axes, theme, title)
        axes.set(xticks=[], yticks=[])
        style: dict[str, Any] = {"color": theme.faint, "fontsize": pictures.FONT}
        axes.text(0, 0.9, "not measured on this GPU", transform=axes.transAxes, **style)
        return
    held = [
        (_head(size, found, what), _bars(found, what)) for size, found in sorted(groups.items())
    ]
    pictures.bars(axes, theme, held, title)


def _head(size: tuple[int, ...], found: dict[str, Row], what: str) -> str:
    """What was measured, and when."""
    layers, batch, length = size
    ours = found["ours"]
    text = f"batch {batch}, prompt {length}" if what == "token" else f"batch {batch} x {length}"
    if "num_hidden_layers" in (ours["run"].get("changes") or {}):
        text = f"{layers} layers, {text}"
    text += f"; {ours['run']['date'][:10]}"
    before = what == "token" and not _has_whole_tokens(ours)
    return f"{text}, before decode_attention" if before else text


def _bars(found: dict[str, Row], what: str) -> list[pictures.Bar]:
    shown = {name: found[name] for name in pictures.in_order(found) if name in SHOWN}
    if what == "token":
        return charts.token_times(shown)
    if what == "memory":
        return charts.bars(shown, "peak_gib", 1.0, " GiB")
    return charts.bars(shown, "tokens_per_s", 1e-3, "k")


def _by_model(sections: Sections) -> dict[tuple[str, str, str], Groups]:
    """(GPU, kind, model) -> groups, without what failed or was measured without ours."""
    found: dict[tuple[str, str, str], Groups] = {}
    for (gpu, _), section in sections.items():
        if section["kind"] not in _FIGURES:
            continue
        for row in section["rows"].values():
            run = row["run"]
            whole = (run["device"]["type"], run["dtype"], row["error"]) == ("cuda", "bf16", None)
            # With another loss, or with the optimizer, it is another step.
            if whole and row.get("loss_of") == "each" and row.get("step") == "forward and backward":
                size = row["layers"], row["batch"], row.get("length", row.get("prompt"))
                place = gpu, section["kind"], row["model"]
                found.setdefault(place, {}).setdefault(size, {})[row["variant"]] = row
    return {
        place: kept
        for place, groups in found.items()
        if (kept := {size: rows for size, rows in groups.items() if "ours" in rows and _base(rows)})
    }


def _base(found: dict[str, Row]) -> str:
    """What transformers does by default, of experts ``grouped_mm``; "" where it is not there."""
    return "grouped_mm" if "grouped_mm" in found else tables.baseline(found) or ""


def _has_whole_tokens(row: Row) -> bool:
    return "decode_attention" in row.get("patch", "")

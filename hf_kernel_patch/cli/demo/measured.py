"""What was measured on GPUs: the table that the demo shows, from the raw files of the benchmarks.

``measured.json`` is made by ``python -m benchmarks summary`` and not edited by hand.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

Cell = dict[str, Any]
COLUMNS = ("model", "measured", "as it is", "patched", "gain")


def cells(gpu: str = "") -> list[Cell]:
    """One cell a GPU, model and kind of work: those of this GPU if it was measured, else all."""
    text = files("hf_kernel_patch.cli.demo").joinpath("measured.json").read_text(encoding="utf-8")
    every: list[Cell] = json.loads(text)
    return [one for one in every if one["gpu"] == gpu] or every


def tables(chosen: list[Cell]) -> dict[str, list[tuple[str, ...]]]:
    """GPU -> the lines of its table."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for one in chosen:
        found.setdefault(one["gpu"], []).extend(_lines(one))
    return found


def notes(chosen: list[Cell]) -> list[str]:
    """What has to be known about the lines, or about some of them."""
    dates = sorted(one["date"] for one in chosen)
    versions = sorted({one["transformers"] for one in chosen})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    found = [f"measured {when} with transformers {' and '.join(versions)}"]
    for one in chosen:
        if one["kind"] == "e2e":
            found.append(f"training: batch {one['batch']} x {one['length']}")
        if one["baseline"] != "eager":
            found.append(f"{one['model']} as it is: experts by {one['baseline']}, the default")
        if one["kind"] == "decode" and not one["decode_attention"]:
            found.append("decoding: before decode_attention took the place of older graphs")
    return list(dict.fromkeys(found))


def _lines(one: Cell) -> list[tuple[str, ...]]:
    eager, patched = one["as_it_is"], one["patched"]

    def line(what: str, key: str, form: str) -> tuple[str, ...]:
        ratio = patched[key] / eager[key]
        gain = {
            "tokens_per_s": f"{ratio:.2f} x as fast",
            "ms_per_token": f"{1 / ratio:.2f} x as fast",
            "peak_gib": f"{ratio:.2f} x the memory",
        }[key]
        model = f"{one['model']}, {one['layers']} layers"
        return model, what, f"{eager[key]:{form}}", f"{patched[key]:{form}}", gain

    if one["kind"] == "decode":
        return [line(f"decoding, batch {one['batch']}, ms a token", "ms_per_token", ".1f")]
    return [
        line("training, tokens/s", "tokens_per_s", ",.0f"),
        line("training, peak GiB", "peak_gib", ".1f"),
    ]

"""docs/families.md, made of the record."""

from __future__ import annotations

import json
from pathlib import Path

from tests.families.cases import CLASSES, SKIPPED
from tests.families.record import TRANSFORMERS, Record

PATH = Path(__file__).parents[2] / "docs" / "families.md"
UPSTREAM = Path(__file__).parents[1] / "upstream" / "results.json"
#: op -> (its column, families that are to have a served call at least).
OPS = {
    "rms_norm": ("norm", 150),
    "rope": ("rotary", 140),
    "swiglu": ("gated MLP", 150),
    "add_rms_norm": ("sum + norm", 120),
    "linear_cross_entropy": ("head + loss", 160),
    "qk_norm_rope": ("q/k norm + rotary", 40),
    "moe": ("experts", 50),
}
_HEAD = f"""# Families

Written by `python -m tests.families`, transformers {TRANSFORMERS}. For every family a tiny model of
the real class is trained for one step and generates, as it is and with every op patched: losses,
logits and all gradients equal those of the original in float32 (or are no further from a float64
run of it than the original's own rounding), also with packed rows and with gradient checkpointing;
the generated tokens are the same. `tests/families/test_families.py` holds that, family by family.
"""


def totals(record: Record) -> dict[str, int]:
    """op -> families with a served call."""
    return {
        op: sum(
            any(found["served"].get(op) for found in classes.values())
            for classes in record.values()
        )
        for op in OPS
    }


def text(record: Record) -> str:
    """The page."""
    return "\n".join(
        [
            _HEAD,
            "## Totals\n",
            *_table(
                ["op", "what it replaces", "families", "aim"],
                [
                    [f"`{op}`", OPS[op][0], str(count), str(OPS[op][1])]
                    for op, count in totals(record).items()
                ],
            ),
            f"\nOf {len(record) + len(SKIPPED)} families {len(record)} are run.\n",
            "## Calls served in one training step\n",
            "Input: what the class is given beside token ids; text where a model that sees or "
            "hears is asked with text alone.\n",
            *_table(
                ["family", "class", "input", *(name for name, _ in OPS.values())], _rows(record)
            ),
            "\n## Left out\n",
            *_table(
                ["family", "reason"],
                [[f"`{name}`", reason] for name, reason in sorted({**SKIPPED, **CLASSES}.items())],
            ),
            "\n## What a class does not do as it is\n",
            *_table(
                ["class", "what", "the original's error"],
                [
                    [f"`{name}`", scenario, f"`{reason}`".replace("``", "`")]
                    for classes in record.values()
                    for name, found in classes.items()
                    for scenario, reason in found["without"].items()
                ],
            ),
            *_upstream(),
            "",
        ]
    )


def _rows(record: Record) -> list[list[str]]:
    return [
        [
            f"`{family}`",
            f"`{name}`",
            found["inputs"],
            *(str(found["served"].get(op, "")) for op in OPS),
        ]
        for family in sorted(record)
        for name, found in sorted(record[family].items())
    ]


def _upstream() -> list[str]:
    if not UPSTREAM.exists():
        return []
    found = json.loads(UPSTREAM.read_text(encoding="utf-8"))
    heads = [
        "architecture",
        "pass as they are",
        "pass patched",
        "calls served",
        "fail patched alone",
    ]
    return [
        "\n## transformers' own tests of models\n",
        "Written by `python tests/upstream/run.py`, see its README.\n",
        *_table(
            heads,
            [
                [
                    f"`{name}`",
                    str(one["passed"]),
                    str(one["patched"]),
                    str(one["served"]),
                    ", ".join(f"`{test}`" for test in one["lost"]),
                ]
                for name, one in sorted(found.items())
            ],
        ),
    ]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]

"""The options by which several commands choose kernels and models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# ``show_default=False``: the texts name the defaults, which the environment can change.
Include = Annotated[
    str | None,
    typer.Option(
        help="auto, measured, or kernel ids and ops, separated by commas. "
        "(default: HF_KERNEL_PATCH, else auto)",
        show_default=False,
    ),
]
Exclude = Annotated[
    str | None,
    typer.Option(
        help="Kernel ids, ops and sites such as '*.LlamaMLP.forward' to leave out. "
        "(default: HF_KERNEL_PATCH_EXCLUDE, else none)",
        show_default=False,
    ),
]
Models = Annotated[
    str | None,
    typer.Option(
        help="all, or model types such as llama,gemma3. "
        "(default: HF_KERNEL_PATCH_MODELS, else all)",
        show_default=False,
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="auto, torch, triton or npu. (default: HF_KERNEL_PATCH_BACKEND, else auto)",
        show_default=False,
    ),
]
Options = Annotated[
    str | None,
    typer.Option(
        help="Options of kernels, such as linear_cross_entropy.exact=1. "
        "(default: HF_KERNEL_PATCH_OPTIONS, else none)",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="A YAML file with a kernel_config, such as a training file; options and variables "
        "win over it. (default: none)",
        show_default=False,
    ),
]

Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16. (default: that of the saved weights; of random "
        "ones float32 on a CPU, else bfloat16)",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 or npu. (default: what is here)", show_default=False),
]


def given(**options: str | None) -> dict[str, str]:
    """What was given, by the names of ``patch_transformers``'s arguments."""
    return {name: value for name, value in options.items() if value is not None}

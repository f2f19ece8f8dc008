"""``hf-kernel-patch bench``: a model is built, measured, and what was found is told and drawn."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hf_kernel_patch import devices
from hf_kernel_patch.api import require_unpatched
from hf_kernel_patch.benchmarking.choosing import Choice, check
from hf_kernel_patch.benchmarking.result import Benchmark
from hf_kernel_patch.benchmarking.running import Run
from hf_kernel_patch.cli import bench_liger, bench_picture
from hf_kernel_patch.cli.demo import progress
from hf_kernel_patch.cli.outputs import check_files
from hf_kernel_patch.patching.choosing import choose
from hf_kernel_patch.workload import batch_of, load
from hf_kernel_patch.workload.shrinking import shrink

if TYPE_CHECKING:
    from torch import nn

#: Of a model type on an accelerator: so many layers of the widths of its config.
LAYERS = 4
#: (sequences, tokens of each), unless somebody says otherwise.
ON_CPU, ON_ACCELERATOR = (4, 128), (4, 2048)
SMALL = "very small"
#: Sizes of a model type on a CPU, where its config has them: a step takes less than a second.
WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 192,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Model:
    """What is measured, as the command line has it; None where that is left to the device."""

    name: str
    dtype: str | None
    device: str | None
    layers: int | None
    batch: int | None
    length: int | None
    seed: int = 0
    liger: bool = False
    #: Of a model type on a CPU: whether it runs with ``WIDTHS``, None where that is to be tried.
    fits: bool | None = None


def measure(model: Model, choice: Choice, plot: Path | None, json: Path | None) -> None:
    """Build the model, run the benchmark, print what it found and write the files.

    Raises:
        ValueError: something that was given cannot be used.
        OSError: a file cannot be written.
        KernelPatchError: the model cannot be built or measured, or matplotlib is missing.
        typer.Exit: Ctrl-C has ended it; what is known by then is printed.
    """
    check(choice)
    require_unpatched()
    choose(**choice.arguments)
    check_files(json, plot)
    with progress.on_stderr() as told:
        told.begin("building the model")
        built, note = build(model)
        batch = _batch(built, model, choice)
        with _with_liger(model, built, note, batch, choice) as chosen:
            run = Run(built, batch, chosen, told)
            try:
                found = run.result()
            except KeyboardInterrupt:
                typer.echo("interrupted; nothing stays patched", err=True)
                if run.so_far().rounds:
                    typer.echo(str(run.so_far()) + note)
                raise typer.Exit(130) from None
    typer.echo(str(found) + note)
    _write(found, plot, json)


@contextmanager
def _with_liger(
    model: Model, built: Any, note: str, batch: dict[str, Any], choice: Choice
) -> Iterator[Choice]:
    """The choice with Liger's turns, if those are wanted."""
    if not model.liger:
        yield choice
        return
    model = replace(model, fits=SMALL not in note)  # so that both are as large
    model_type = built.config.model_type
    bench_liger.check(model_type)
    with bench_liger.started(model, model_type, batch, choice) as turn:
        yield replace(choice, others={"liger": turn})


def build(model: Model) -> tuple[nn.Module, str]:
    """The model, and what there is to say of how it was made."""
    where = model.device or devices.current()
    options: dict[str, Any] = {"dtype": model.dtype, "device": where, "seed": model.seed}
    if not _is_type(model.name):
        return load(model.name, layers=model.layers, tell=typer.echo, **options), ""
    if where != "cpu":
        layers = model.layers or LAYERS
        note = (
            f"random weights: the widths of the config of {model.name}, and {layers} layers of it"
        )
        return load(model.name, tiny=False, layers=layers, **options), f"\n{note}"
    wide = _wide(model, options) if model.fits is not False else None
    size = SMALL if wide is None else "small"
    built = load(model.name, layers=model.layers, **options) if wide is None else wide
    return built, (
        f"\nrandom weights: a {size} {model.name}, as this is a CPU. Gains of a real model on a "
        "GPU are others."
    )


def _wide(model: Model, options: dict[str, Any]) -> nn.Module | None:
    """A model type with ``WIDTHS``, or None where its config is not made for them."""
    import torch
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model.name]
    default = kind()
    changes = {name: value for name, value in WIDTHS.items() if hasattr(default, name)}
    try:
        with tempfile.TemporaryDirectory(prefix="hf-kernel-patch-") as folder:
            shrink(kind, changes).save_pretrained(folder)
            made = load(folder, layers=model.layers, tell=lambda line: None, **options)
        if model.fits:
            return made
        with torch.no_grad():
            made(**batch_of(made, batch=1, length=8))
    except Exception:  # sizes that do not fit each other fail in as many ways as there are models
        return None
    return made


def _batch(built: Any, model: Model, choice: Choice) -> dict[str, Any]:
    """Random tokens; of the default length as many as the model takes."""
    accelerator = next(built.parameters()).device.type != "cpu"
    batch, length = ON_ACCELERATOR if accelerator else ON_CPU
    config: Any = getattr(built, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and longest > 0:
        length = min(length, max(longest - choice.decode, 1))
    return batch_of(
        built,
        batch=batch if model.batch is None else model.batch,
        length=length if model.length is None else model.length,
        seed=choice.seed,
    )


def _is_type(name: str) -> bool:
    from transformers import CONFIG_MAPPING

    return name in CONFIG_MAPPING and not Path(name).is_dir()


def _write(found: Benchmark, plot: Path | None, json: Path | None) -> None:
    if plot is not None:
        bench_picture.draw(plot, found)
        typer.echo(f"picture: {plot}")
    if json is not None:
        json.write_text(found.to_json() + "\n", encoding="utf-8")
        typer.echo(f"JSON: {json}")

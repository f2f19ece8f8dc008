"""The commands that measure a model: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_kernel_patch.cli.commands.app import app, mistakes_told
from hf_kernel_patch.cli.commands.choice import (
    Backend,
    Config,
    Device,
    Dtype,
    Exclude,
    Include,
    Models,
    Options,
    given,
)
from hf_kernel_patch.cli.commands.looking import A_MODEL


@app.command()
def bench(
    target: Annotated[str, typer.Argument(metavar="MODEL", help=f"{A_MODEL}.", show_default=False)],
    include: Include = None,
    exclude: Exclude = None,
    models: Models = None,
    backend: Backend = None,
    options: Options = None,
    config: Config = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences. (default: 4)", show_default=False)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of each. (default: 128 on a CPU, else 2048, as far as the model goes)",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="So many layers. (default: all of a saved model, else 2 on a CPU and 4 elsewhere)",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each variant.")] = 12,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Measure a training step.")
    ] = True,
    decode: Annotated[
        int, typer.Option(min=0, help="Tokens to decode for each sequence; 0 for no decoding.")
    ] = 32,
    ops: Annotated[
        bool, typer.Option("--ops/--no-ops", help="Measure each op alone and left out.")
    ] = True,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Measure what torch.compile makes of the model.")
    ] = False,
    liger: Annotated[
        bool, typer.Option("--liger", help="Measure Liger, in a process of its own.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, tokens, dropout and turns.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw a picture: .png, .jpg, .pdf or .svg. (default: none)", show_default=False
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Write every round as JSON. (default: no file)", show_default=False),
    ] = None,
) -> None:
    """Measure speed and memory of a model, eager and patched, and what each op gains."""
    with mistakes_told():
        from hf_kernel_patch.benchmarking.choosing import Choice
        from hf_kernel_patch.cli.bench import Model, measure

        chosen = given(
            include=include, exclude=exclude, models=models, backend=backend, options=options
        )
        choice = Choice(
            arguments={**chosen, "config": config, "strict": False},
            train=train,
            decode=decode,
            rounds=rounds,
            ops=ops,
            compiled=compiled,
            seed=seed,
        )
        model = Model(target, dtype, device, layers, batch, length, seed, liger)
        measure(model, choice, plot, json)

"""The command that compares a model with the truth: verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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

#: What is given as the default of ``verify``, which this file does not import before it is asked.
FACTOR = 3.0


@app.command()
def verify(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A saved model's folder, that of an adapter of PEFT, a name on the Hub that is in "
            "the local cache, or a model type, for a small model with random weights.",
            show_default=False,
        ),
    ],
    include: Include = None,
    exclude: Exclude = None,
    models: Models = None,
    backend: Backend = None,
    options: Options = None,
    config: Config = None,
    dtype: Dtype = None,
    device: Device = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many layers. (default: all)", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 64,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A file to take the tokens from. (default: random ones)", show_default=False
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--eval", help="The mode; the loss is fused in training alone.")
    ] = True,
    factor: Annotated[
        float, typer.Option(help="How many times eager's own error the error of a site may be.")
    ] = FACTOR,
    seed: Annotated[int, typer.Option(min=0, help="Of what is random.")] = 0,
    json: Annotated[
        Path | None,
        typer.Option(
            help="Write all that was found to this file. (default: no file)", show_default=False
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture of the errors by layer: .png, .jpg, .pdf or .svg. "
            "(default: no picture)",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare every patched site of a model with float64, beside the original's own error.

    The exit status is 1 where one is further from the truth than the original, by the factor, and
    where nothing could be verified.
    """
    from hf_kernel_patch.cli.outputs import check_files
    from hf_kernel_patch.cli.verify import draw, tell, verify_model

    chosen: dict[str, Any] = given(
        include=include, exclude=exclude, models=models, backend=backend, options=options
    )
    with mistakes_told():
        check_files(json, plot, text)
        found = verify_model(
            model,
            {**chosen, "config": config},
            dtype=dtype,
            device=device,
            layers=layers,
            batch=batch,
            length=length,
            text=text,
            train=train,
            factor=factor,
            seed=seed,
        )
        tell(found)
        if json is not None:
            json.write_text(found.to_json() + "\n", encoding="utf-8")
        if plot is not None:
            draw(plot, f"{model}: error of each site, {found.dtype} on {found.device}", found)
    raise typer.Exit(0 if found.ok and found.verified else 1)

"""The demo's picture: loss curves, speeds with their spread, memory."""

from __future__ import annotations

from pathlib import Path

from hf_kernel_patch.cli import pictures
from hf_kernel_patch.cli.demo.comparison import EAGER, MIB, PATCHED, Comparison
from hf_kernel_patch.cli.pictures import LIGHT, Bar

#: By the ending of a file's name; without one it is a PNG.
FORMATS = {"": "png", ".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".pdf": "pdf", ".svg": "svg"}


def check(output: Path) -> None:
    """Raise ValueError or FileNotFoundError where no picture can be written to ``output``."""
    if output.suffix.lower() not in FORMATS:
        known = ", ".join(filter(None, FORMATS))
        raise ValueError(
            f"cannot write a picture as {output.suffix} ({output}); endings of pictures: {known}"
        )
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise FileNotFoundError(f"cannot write the picture to {output}")


def draw(output: Path, title: str, found: Comparison) -> None:
    """Write the picture, in the format that the file's ending says."""
    figure = pictures.figure(LIGHT, 12, 3.8, title)
    losses, speeds, memory = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    colours = pictures.colours(found.runs, LIGHT)
    for name, width, style in ((EAGER, 3.5, "-"), (PATCHED, 1.4, "-")):
        values = found.runs[name].losses
        steps = range(1, len(values) + 1)
        losses.plot(steps, values, style, color=colours[name], linewidth=width, label=name)
    pictures.dress(losses, LIGHT, f"loss: at most {found.apart():.0e} apart", grid="y")
    losses.set(xlabel="step", ylabel="nats a byte")
    losses.legend(frameon=False, fontsize=pictures.FONT, labelcolor=LIGHT.text)
    pictures.bars(speeds, LIGHT, [("", _speeds(found))], "tokens a second (line: middle half)")
    pictures.bars(memory, LIGHT, _memory(found), "peak memory in MiB")
    figure.savefig(output, format=FORMATS[output.suffix.lower()], dpi=120)


def _speeds(found: Comparison) -> list[Bar]:
    bars = []
    for name in (EAGER, PATCHED):
        speed = found.speed(name)
        label = f"{speed.median:,.0f}"
        if name == PATCHED:
            label += f"  {found.speed_up().median:.2f}x"
        bars.append(Bar(name, speed.median, label, (speed.low, speed.high)))
    return bars


def _memory(found: Comparison) -> list[tuple[str, list[Bar]]]:
    groups: dict[str, dict[str, float | None]] = {
        "of the training": {name: run.memory for name, run in found.runs.items()},
        f"of head and loss, {found.loss_tokens} tokens, a real vocabulary": {
            name: run.loss_memory for name, run in found.runs.items()
        },
    }
    return [
        (head, [_bar(name, value, values[EAGER]) for name, value in values.items()])
        for head, values in groups.items()
    ]


def _bar(name: str, value: float | None, eager: float | None) -> Bar:
    if value is None:
        return Bar(name, 0, "not measurable here")
    if value == float("inf"):
        return Bar(name, 0, "more than there is")
    label = f"{value / MIB:,.0f}"
    if name == PATCHED and eager and eager != float("inf"):
        label += f"  {value / eager:.2f}x"
    return Bar(name, value / MIB, label)

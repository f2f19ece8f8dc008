"""What the demo makes of its measurements: ratios, the picture, the table of GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_kernel_patch.cli.demo import measured, picture
from hf_kernel_patch.cli.demo.comparison import (
    EAGER,
    MIB,
    PATCHED,
    Comparison,
    Measured,
    same_beginning,
    spread,
)
from hf_kernel_patch.patching.report import PatchReport


def comparison(steps: int = 4, loss_memory: float | None = 8.0 * MIB) -> Comparison:
    """What two runs could have come to; the patched one takes half of the time."""
    losses = [6.0 - step / 10 for step in range(steps)]
    eager = Measured(losses, [2.0] * steps, 4 * MIB, loss_memory, b"abcd", [0.04, 0.06])
    patched = Measured([*losses], [1.0] * steps, 3 * MIB, loss_memory, b"abXd", [0.02, 0.03])
    return Comparison({EAGER: eager, PATCHED: patched}, PatchReport(), 100, 64)


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("a.png", b"\x89PNG"),
        ("a", b"\x89PNG"),
        ("a.jpeg", b"\xff\xd8\xff"),
        ("a.PDF", b"%PDF"),
        ("a.svg", b"<?xml"),
    ],
)
@pytest.mark.parametrize("loss_memory", [8.0 * MIB, None, float("inf")])
def test_the_picture_is_of_the_kind_that_its_name_says(
    name: str, beginning: bytes, loss_memory: float | None, tmp_path: Path
) -> None:
    if loss_memory != 8.0 * MIB and name != "a.png":
        return
    picture.check(tmp_path / name)
    picture.draw(tmp_path / name, "title", comparison(loss_memory=loss_memory))
    assert (tmp_path / name).read_bytes().startswith(beginning)


def test_speeds_are_medians_without_the_first_steps_and_ratios_turn_by_turn() -> None:
    found = comparison(12)
    assert found.untimed == 5
    assert found.speed(EAGER).median == 50.0
    assert (found.speed(PATCHED).median, found.speed_up().median) == (100.0, 2.0)
    assert found.decoding_speed_up() == 2.0
    assert found.apart() == 0.0
    assert spread([3.0]) == spread([3.0, 3.0])
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]).low == 2.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]).high == 4.0
    assert comparison(2).untimed == 1


def test_texts_are_compared_byte_by_byte() -> None:
    assert same_beginning(b"abcd", b"abXd") == 2
    assert same_beginning(b"abcd", b"abcd") == 4
    assert same_beginning(b"", b"x") == 0


def test_a_gpu_that_was_measured_is_shown_alone_and_any_other_sees_all() -> None:
    every = measured.cells()
    names = {one["gpu"] for one in every}
    assert len(names) > 1
    for name in names:
        assert {one["gpu"] for one in measured.cells(name)} == {name}
    assert measured.cells("NVIDIA RTX 1") == every
    tables = measured.tables(every)
    assert tables.keys() == names
    assert all(len(line) == len(measured.COLUMNS) for lines in tables.values() for line in lines)

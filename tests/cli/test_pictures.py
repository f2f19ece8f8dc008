"""How pictures look."""

from __future__ import annotations

from hf_kernel_patch.cli import pictures
from hf_kernel_patch.cli.pictures import DARK, LIGHT, Bar


def test_what_is_ours_has_one_strong_colour_and_stands_last_in_a_fixed_order() -> None:
    names = ["torch_fused_rope", "cuda_fused_rope", "strange", "compile", "liger", "eager"]
    assert pictures.in_order(names) == [
        *("eager", "liger", "compile", "strange"),
        *("torch_fused_rope", "cuda_fused_rope"),
    ]
    assert pictures.in_order(reversed(names)) == pictures.in_order(names)
    assert pictures.in_order(["ours", "ours+compile", "eager"]) == ["eager", "ours+compile", "ours"]
    for theme in (LIGHT, DARK):
        for chart in (
            names,
            ["eager", "ours+compile", "ours"],
            ["as it is", "patched"],
            ["torch_fused_moe"],
        ):
            colours = pictures.colours(chart, theme)
            strong = [name for name, colour in colours.items() if colour == theme.ours]
            assert strong == [pictures.meant(chart)]
    assert pictures.meant(["eager", "liger"]) is None
    assert pictures.meant(names) == "cuda_fused_rope"


def test_peers_have_the_same_colour_in_every_chart() -> None:
    alone, together = (pictures.colours(names, LIGHT) for names in (["liger"], pictures.PEERS))
    assert alone["liger"] == together["liger"]
    assert pictures.colours(pictures.PEERS, DARK) == together
    assert not {LIGHT.ours, LIGHT.also_ours, DARK.ours, DARK.also_ours} & {*together.values()}


def test_bars_are_labelled_and_groups_do_not_overlap() -> None:
    figure = pictures.figure(LIGHT, 4, 3, "title")
    axes = figure.subplots()
    held = [("first", [Bar("eager", 2.0, "2 s"), Bar("ours", 1.0, "1 s", (0.9, 3.0))])]
    held.append(("second", [Bar("eager", 4.0, "4 s")]))
    places = pictures.bars(axes, LIGHT, held, "seconds")
    assert [text.get_text() for text in axes.texts] == ["first", "2 s", "1 s", "second", "4 s"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["eager", "ours", "eager"]
    assert places["first"][1] < places["second"][0]
    assert axes.get_xlim()[1] > 4


def test_each_group_has_its_own_strong_bar() -> None:
    axes = pictures.figure(LIGHT, 4, 3).subplots()
    names = ("cuda_fused_rmsnorm", "cuda_fused_swiglu")
    groups = [(name, [Bar("eager", 2.0, "2"), Bar(name, 1.0, "1")]) for name in names]
    pictures.bars(axes, LIGHT, groups)
    bold = [label.get_text() for label in axes.get_yticklabels() if label.get_weight() == "bold"]
    assert bold == [*names]

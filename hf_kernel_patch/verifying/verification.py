"""What a verification has found: a row for each module of a site, and the model as a whole."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.errors import listed
from hf_kernel_patch.verifying.comparing import Measure, worst
from hf_kernel_patch.version import versions

if TYPE_CHECKING:
    from torch import nn

#: How many modules that are worse are told of in words, the worst ones.
TOLD = 8


class Verdict(StrEnum):
    """What is to be said of a site."""

    RIGHT = "no further from the truth than eager"
    WORSE = "further from the truth than eager"
    #: Every call ran the original's code, so there is nothing to verify.
    NOT_SERVED = "not served"
    #: There is no truth to compare with, or the module was not called.
    NOT_CHECKED = "not checked"

    __repr__ = str.__repr__


@dataclass(frozen=True)
class Checked:
    """One site in one module of the model.

    Attributes:
        site: the function, as the report names it.
        module: the module's path in the model.
        layer: the number in that path, if there is one.
        kernels: ids of the kernels that are in force at the site.
        verdict: what came of it.
        reason: why it was not served or not checked.
        measures: every output and gradient, the worst first.
    """

    site: str
    module: str
    layer: int | None
    kernels: tuple[str, ...]
    verdict: Verdict
    reason: str = ""
    measures: tuple[Measure, ...] = ()

    @property
    def output(self) -> Measure | None:
        """The worst output."""
        return worst(self.measures, gradient=False)

    @property
    def gradient(self) -> Measure | None:
        """The worst gradient, of an input or of a parameter."""
        return worst(self.measures, gradient=True)

    @property
    def excess(self) -> float:
        """How much of what it may be its worst tensor is."""
        failed = math.inf if self.verdict is Verdict.WORSE else 0.0
        return max((one.excess for one in self.measures), default=failed)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "site": self.site,
            "module": self.module,
            "layer": self.layer,
            "kernels": list(self.kernels),
            "verdict": str(self.verdict),
            "reason": self.reason,
            "measures": [one.as_dict() for one in self.measures],
        }


@dataclass(frozen=True)
class Verification:
    """What ``verify`` has found.

    Attributes:
        rows: a row for each module of each site that was patched.
        whole: loss, logits, hidden states and gradients of the whole model.
        note: why the whole model was not compared, where it was not.
        factor: what may lie between eager's distance from the truth and ours.
        dtype: of the model.
        device: on which it ran.
        train: whether it was in training mode.
    """

    rows: tuple[Checked, ...]
    whole: tuple[Measure, ...]
    note: str
    factor: float
    dtype: str
    device: str
    train: bool

    @property
    def worse(self) -> tuple[Checked, ...]:
        """The rows that are further from the truth than eager."""
        return tuple(row for row in self.rows if row.verdict is Verdict.WORSE)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are worse, each once."""
        return tuple(dict.fromkeys(row.site for row in self.worse))

    @property
    def exclude(self) -> str:
        """What ``exclude=`` takes to leave these sites out."""
        return ",".join(self.sites)

    @property
    def verified(self) -> tuple[str, ...]:
        """The sites of which something could be compared, each once."""
        return tuple(dict.fromkeys(row.site for row in self.rows if row.measures))

    @property
    def ok(self) -> bool:
        """Whether no site and no result of the model is further from the truth than eager.

        Also where nothing was ``verified``.
        """
        return not self.worse and not any(one.worse for one in self.whole)

    def by_site(self) -> dict[str, list[Checked]]:
        """Site -> its rows."""
        found: dict[str, list[Checked]] = {}
        for row in self.rows:
            found.setdefault(row.site, []).append(row)
        return found

    def summary(self) -> str:
        """One line."""
        count = len(self.by_site())
        if not count:
            return "nothing to verify: no site of this model was patched"
        if self.worse:
            said = f"{len(self.sites)} of {count} sites are {Verdict.WORSE}"
        elif not self.ok:
            said = f"no site alone, but the model as a whole is {Verdict.WORSE}"
        elif not self.verified:
            said = f"nothing was verified: none of the {count} sites was served and checked"
        else:
            said = f"{len(self.verified)} of {count} sites verified: {Verdict.RIGHT}"
        mode = "training" if self.train else "evaluation"
        return f"{said} ({self.dtype}, {self.device}, {mode}, factor {self.factor:g})"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "ok": self.ok,
            "summary": self.summary(),
            "factor": self.factor,
            "dtype": self.dtype,
            "device": self.device,
            "train": self.train,
            "note": self.note,
            "versions": versions(),
            "whole": [one.as_dict() for one in self.whole],
            "rows": [row.as_dict() for row in self.rows],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """All of it as JSON."""
        return json.dumps(self.as_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        lines = [self.summary()]
        for title, (names, rows) in self.tables().items():
            widths = [max(map(len, column)) for column in zip(names, *rows)]
            lines += ["", f"{title}:"]
            for row in (names, *rows):
                cells = (cell.ljust(width) for cell, width in zip(row, widths))
                lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self.notes()])

    def tables(self) -> dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """Title -> names of columns and rows: the sites, and the whole model."""
        found: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {}
        if self.rows:
            found["error of each site by itself, on what eager gives it"] = (
                ("site", "modules", "output", "eager's", "gradient", "eager's", "verdict"),
                [_line(site, rows) for site, rows in self.by_site().items()],
            )
        if self.whole:
            found["error of the model with every site patched"] = (
                ("result", "error", "eager's", "verdict"),
                [
                    (
                        one.name,
                        f"{one.ours:.1e}",
                        f"{one.eager:.1e}",
                        "WORSE" if one.worse else "ok",
                    )
                    for one in self.whole
                ],
            )
        return found

    def notes(self) -> list[str]:
        """Sentences below the tables."""
        found = [f"the model as a whole was not compared: {self.note}"] if self.note else []
        shown = sorted(self.worse, key=lambda row: -row.excess)[:TOLD]
        for row in shown:
            bad = row.reason or listed((_told(one) for one in row.measures[:3] if one.worse), "; ")
            found.append(f"worse: {row.module or 'the model'} by {', '.join(row.kernels)}: {bad}")
        if more := len(self.worse) - len(shown):
            found.append(f"worse: {more} modules more, see rows or --json")
        if self.worse:
            found.append(f'leave out what is worse by exclude="{self.exclude}"')
        return ["", *found] if found else []


def _result(one: Measure) -> tuple[str, ...]:
    return one.name, f"{one.ours:.1e}", f"{one.eager:.1e}", "WORSE" if one.worse else "ok"


def _line(site: str, rows: Sequence[Checked]) -> tuple[str, ...]:
    """A site with the numbers of its worst module."""
    measured = [row for row in rows if row.measures]
    cells = ["-"] * 4
    if measured:
        for place, gradient in ((0, False), (2, True)):
            every = (one for row in measured for one in row.measures)
            if (found := worst(every, gradient)) is not None:
                cells[place : place + 2] = f"{found.ours:.1e}", f"{found.eager:.1e}"
    return (site.removeprefix("transformers.models."), str(len(rows)), *cells, _said(rows))


def _said(rows: Sequence[Checked]) -> str:
    """The verdict on a site: the worst of its modules', and how many have another."""
    bad = [row for row in rows if row.verdict is Verdict.WORSE]
    if bad:
        first = max(bad, key=lambda row: row.excess)
        return f"WORSE in {len(bad)} of {len(rows)}, most in {first.module or 'the model'}"
    others = [row for row in rows if row.verdict is not Verdict.RIGHT]
    told = list(dict.fromkeys(f"{row.verdict}: {row.reason}" for row in others))
    if len(others) == len(rows):
        return listed(told, "; ")
    return "ok" if not others else f"ok; {len(others)} of {len(rows)} {listed(told, '; ')}"


def _told(one: Measure) -> str:
    what = f"gradient of {one.name}" if one.gradient else one.name
    return f"{what} is {one.ours:.1e} from the truth, eager {one.eager:.1e}"


def dtypes_of(model: nn.Module) -> str:
    """The dtypes of a model's weights, in words."""
    names = {str(one.dtype).removeprefix("torch.") for one in model.parameters()}
    return ", ".join(sorted(names))

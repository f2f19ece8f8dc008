"""What a table is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Target:
    """One row: the leaf ``code`` is expected at ``module``.``qualname``, or the rule to find it.

    ``transformers`` is the range of versions that have the target, such as "<5"; in others the
    row does not exist. ``near`` says, of code that was looked for and that no leaf or rule knows,
    why it is not the one that it looks like.
    """

    module: str
    qualname: str
    code: str
    transformers: str = ""
    near: str = ""

    @property
    def site(self) -> str:
        return f"{self.module}.{self.qualname}"


class Architecture:
    """The patch table of one architecture.

    Args:
        name: the ``model_type`` of its config in transformers.
        rows: qualified name -> leaf or rule, or (that, range of transformers versions).
        module: the modelling module; by default the one of transformers with that name.
        transformers: the range of versions that have the model, for rows without one.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[str, str | tuple[str, str]],
        module: str | None = None,
        transformers: str = "",
    ):
        self.name = name
        self.module = module or f"transformers.models.{name}.modeling_{name}"
        self.targets = tuple(
            Target(self.module, qualname, *((row, transformers) if isinstance(row, str) else row))
            for qualname, row in rows.items()
        )

    def rename(self, names: Mapping[str, str]) -> None:
        """Other names for leaves and rules."""
        self.targets = tuple(
            replace(target, code=names.get(target.code, target.code)) for target in self.targets
        )

    def __repr__(self) -> str:
        return f"Architecture({self.name!r}, {len(self.targets)} targets in {self.module})"

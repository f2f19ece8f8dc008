"""What a table is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_kernel_patch.errors import shown


@dataclass(frozen=True)
class SiteSpec:
    """Where a site is, and the leaf or rule ``code`` that is expected there.

    ``transformers`` is the range of versions that have the site, such as "<5". ``near`` says, of
    code that was looked for and that no leaf or rule knows, why it is not the one that it looks
    like.
    """

    module: str
    qualname: str
    code: str
    transformers: str = ""
    near: str = ""

    @property
    def name(self) -> str:
        """The site's name in reports."""
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
        if not isinstance(name, str) or not name:
            raise TypeError(f"Architecture: a name is a string, such as 'llama', not {shown(name)}")
        if not isinstance(rows, Mapping):
            raise TypeError(
                "Architecture: the rows map names to a leaf or a rule, such as "
                f"{{'LlamaMLP.forward': 'gated_product'}}, not {shown(rows)}"
            )
        for qualname, row in rows.items():
            pair = (row,) if isinstance(row, str) else row
            whole = isinstance(row, (str, tuple)) and len(pair) in (1, 2)
            if not (whole and all(isinstance(one, str) for one in (qualname, *pair))):
                raise TypeError(
                    "Architecture: a row is a name and a leaf or a rule, or a pair of that and a "
                    f"range of versions such as '>=5', not {shown(qualname)}: {shown(row)}"
                )
        self.name = name
        self.module = module or f"transformers.models.{name}.modeling_{name}"
        self.sites = tuple(
            SiteSpec(self.module, qualname, *((row, transformers) if isinstance(row, str) else row))
            for qualname, row in rows.items()
        )
        # A language model's forward decodes tokens wherever it has a head and a loss.
        heads = [spec for spec in self.sites if spec.code == "head_loss"]
        self.sites += tuple(replace(spec, code="decoding") for spec in heads)

    def rename(self, names: Mapping[str, str]) -> None:
        """Other names for leaves and rules."""
        self.sites = tuple(
            replace(spec, code=names.get(spec.code, spec.code)) for spec in self.sites
        )

    def __repr__(self) -> str:
        return f"Architecture({self.name!r}, {len(self.sites)} sites in {self.module})"

"""Sites that a request leaves alone: patterns of their names, and which of these match nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import chain

from hf_kernel_patch import models, registry
from hf_kernel_patch.errors import nearest, shown
from hf_kernel_patch.models import Selection
from hf_kernel_patch.patching import bisection
from hf_kernel_patch.patching.construction import modules_of_models
from hf_kernel_patch.patching.imports import is_imported
from hf_kernel_patch.patching.lookup import exists_here
from hf_kernel_patch.settings import Settings


class Exclusion:
    """The sites that one request leaves to the original.

    ``source`` says where the patterns were given, or is "" for an argument.
    """

    def __init__(self, names: Iterable[str] = (), source: str = ""):
        self.patterns = registry.site_patterns(names)
        self.source = source
        self._trial = bisection.current()

    def why(self, site: str) -> str:
        """Why a site is excluded, or ""."""
        for pattern in self.patterns:
            if matches(pattern, site):
                where = f" in {self.source}" if self.source else ""
                return f"excluded by {shown(pattern)}{where}"
        if self._trial is not None and not self._trial.allows(site):
            return "excluded by bisect, in this run"
        return ""

    def complaints(self, sites: Iterable[str] | None, selection: Selection) -> list[str]:
        """One for each pattern that matches no site.

        Args:
            sites: the names of all sites that there can be, or None where only ``selection`` says.
            selection: where a pattern may match. One that was not given for this call alone, but
                by a variable or a config, may match anywhere.
        """
        if not self.patterns:
            return []
        everywhere = models.select("all") if self.source else selection
        names = set() if sites is None else set(sites)
        if sites is None or self.source:
            names |= set(_known_sites(everywhere))
        left = [one for one in self.patterns if not any(matches(one, name) for name in names)]
        if sites is None or self.source:
            left = [one for one in left if not _may_come(one, everywhere)]
        return [self._complaint(one, names) for one in left]

    def _complaint(self, pattern: str, names: Collection[str]) -> str:
        where = f" in {self.source}" if self.source else ""
        return f"no site matches {shown(pattern)} in exclude{where}{_hint(pattern, names)}"


def exclusion_of(settings: Settings) -> Exclusion:
    """The exclusion that settings ask for."""
    return Exclusion(settings.exclude, settings.sources.get("exclude", ""))


def matches(pattern: str, site: str) -> bool:
    """Whether a pattern means a site, by its full name or as tables of reports shorten it."""
    return any(
        name == pattern or fnmatchcase(name, pattern)
        for name in (site, site.removeprefix(models.PREFIX))
    )


def _hint(pattern: str, names: Collection[str]) -> str:
    """The nearest patterns that do match something."""
    known = {
        ".".join(name.split(".")[-2 if name.split(".")[-2][:1].isupper() else -1 :])
        for name in names
    }
    given = ".".join(pattern.split(".")[-2:])
    near = nearest(given, known, 0.6) or nearest(given.rpartition(".")[2], known, 0.6)
    return f"; did you mean {' or '.join(repr(f'*.{one}') for one in near)}?" if near else ""


def _known_sites(selection: Selection) -> Iterator[str]:
    """The names of all sites of tables, and of those found in the modules that are imported."""
    for table in selection.tables:
        yield from (spec.name for spec in table.sites if exists_here(spec))
    imported = [name for name in list(sys.modules) if models.is_modelling(name)]
    for name in dict.fromkeys([*imported, *modules_of_models()]):
        if selection.discovers(name) and is_imported(name):
            yield from (spec.name for spec in models.discovered(name))


def _may_come(pattern: str, selection: Selection) -> bool:
    """Whether a pattern may mean a site of a module that is not imported yet."""
    first, *_ = parts = pattern.split(".")
    if len(parts) == 2 and first[:1].isupper():  # a class and its method, without a module
        return False
    if first.partition("*")[0] == first and first not in ("transformers", *models.families()):
        # Code outside of transformers. If its module is there, its sites are known.
        return not is_imported(".".join(parts[:-2])) and not is_imported(".".join(parts[:-1]))
    words = [part for part in parts if re.fullmatch(r"\w+", part)]
    for name in chain(*models.families().values()):
        if is_imported(name) or not selection.discovers(name):
            continue
        text = models.file_of(name).read_text(encoding="utf-8", errors="replace")
        if all(word in name or word in text for word in words) and any(
            matches(pattern, f"{name}.{function}") for function in _functions(text)
        ):
            return True
    return False


def _functions(text: str) -> Iterator[str]:
    """The qualified names of a file's functions and methods, read line by line."""
    owner = ""
    for kind, named, inside in re.findall(
        r"^(?:(class|def) (\w+)|    (?:async )?def (\w+))", text, re.MULTILINE
    ):
        if kind == "class":
            owner = f"{named}."
        elif kind == "def":
            owner = ""
            yield named
        elif owner:
            yield f"{owner}{inside}"

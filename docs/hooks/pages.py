"""Hooks of mkdocs: the pages outside of docs/, and links that lead to files of the source.

README.md, CONTRIBUTING.md and others are pages of the site too. Their links, and those of docs/,
are paths in the source. A link to a page leads to that page; one to a picture, to a copy of it; one
to any other file of the source becomes the file's name. A link that leads nowhere stays, and
mkdocs, which is strict, fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
#: File of the source -> page of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
    "npusim/README.md": "npusim.md",
}
PICTURES = "benchmarks/charts"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages outside of docs/, and the pictures that they show."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"charts/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page to the pages of the site."""
    path = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    folder = posixpath.dirname(path)

    def led(found: re.Match[str]) -> str:
        mark, words, target, anchor = found.groups(default="")
        if not target or re.match(r"[a-z]+:", target):
            return found.group()
        source = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / source).exists():
            return found.group()
        if source in PAGES:
            return f"[{words}]({PAGES[source]}{anchor})"
        if source.startswith("docs/"):
            return f"{mark}[{words}]({source.removeprefix('docs/')}{anchor})"
        if source.startswith(PICTURES):
            return f"{mark}[{words}]({source.replace(PICTURES, 'charts')})"
        return words

    return LINK.sub(led, markdown)

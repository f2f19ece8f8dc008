"""Metadata is in setup.cfg. What is made here is the description that a package index shows.

README.md names pictures and pages of the source by relative paths, which lead nowhere on an index.
There the pictures are left out and the pages are named by their paths.
"""

import re
from pathlib import Path

from setuptools import setup

PICTURES = re.compile(
    r"^(?:<picture>.*?</picture>|!\[[^\]]*\]\([^)]*\))\n+", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)[^)]*\)")
PATHS = "Paths are those of the source distribution, which holds all pages and pictures."


def named(link: re.Match[str]) -> str:
    """The words of a relative link, and the path that it leads to."""
    words, path = link.groups()
    return f"`{path}`" if words.strip("`/") == path else f"{words} (`{path}`)"


def description(readme: str) -> str:
    """README.md without relative links and pictures."""
    heading, _, rest = readme.partition("\n\n")
    return f"{heading}\n\n{PATHS}\n\n{LINK.sub(named, PICTURES.sub('', rest))}"


setup(
    long_description=description(Path(__file__).with_name("README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
)

"""Text that fits a terminal of 80 columns, and progress bars."""

import os
import re
import textwrap
from collections.abc import Iterable

from tqdm import tqdm

WIDTH, UNBROKEN = 80, {"break_long_words": False, "break_on_hyphens": False}


def row(name: str, text: str) -> str:
    """A row of the table that describes a run; a long text goes on below itself. Paths are never broken."""
    return textwrap.fill(f"{name:<11}{text}", WIDTH, subsequent_indent=" " * 11, **UNBROKEN)


def fit(text: str) -> str:
    """A docstring: its paragraphs filled anew; of a table row that is too long, the last column goes below it."""
    parts = text.strip().split("\n\n")
    for number, part in enumerate(parts):
        if re.search(r"^ |\S {3}", part, re.MULTILINE):
            parts[number] = re.sub(r"^(?=.{81})(.*?\S) {2,}", r"\1\n        ", part, flags=re.MULTILINE)
        else:
            parts[number] = textwrap.fill(part, WIDTH, **UNBROKEN)
    return "\n\n".join(parts)


def progress_bar(
    iterable: Iterable | None = None, description: str = "", total: float | None = None, shown: bool = True, **options
) -> tqdm:
    """A bar that vanishes at its end. There is none in a file, nor on a terminal that cannot move its cursor."""
    hidden = not shown or os.environ.get("TERM") == "dumb"
    return tqdm(iterable, description, total, leave=False, dynamic_ncols=True, disable=hidden or None, **options)

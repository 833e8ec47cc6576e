"""Text for a terminal of 80 columns, and progress bars."""

import os
import re
import textwrap
from collections.abc import Iterable

from tqdm import tqdm

WIDTH, UNBROKEN = 80, {"break_long_words": False, "break_on_hyphens": False}


def row(name: str, text: str) -> str:
    """A name and its text in two columns; long texts wrap within theirs. Paths are never broken."""
    return textwrap.fill(f"{name:<11}{text}", WIDTH, subsequent_indent=" " * 11, **UNBROKEN)


def fit(text: str) -> str:
    """A docstring with its paragraphs filled; in a table, the last column of a row that is too long moves below it."""

    def fitted(part):
        if re.search(r"^ |\S {3}", part, re.MULTILINE):
            return re.sub(r"^(?=.{81})(.*?\S) {2,}", r"\1\n        ", part, flags=re.MULTILINE)
        return textwrap.fill(part, WIDTH, **UNBROKEN)

    return "\n\n".join(map(fitted, text.strip().split("\n\n")))


def progress_bar(iterable: Iterable | None, description: str, total=None, shown=True, **options) -> tqdm:
    """A progress bar that vanishes at its end; none in a file or on a terminal that cannot move its cursor."""
    hidden = not shown or os.environ.get("TERM") == "dumb"
    return tqdm(iterable, description, total, leave=False, dynamic_ncols=True, disable=hidden or None, **options)

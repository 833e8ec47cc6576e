"""A page made of blocks, as one HTML file that needs nothing else and as Markdown.

Every text may come from a model or a data set, so none of it is trusted: in the HTML it is escaped, control characters
are shown and not obeyed, and a policy in the page's head forbids scripts and the network.
"""

import base64
import html
import itertools
import math
import re
from dataclasses import dataclass, field

BIT_EDGES = (1.0, 2.0, 4.0, 8.0, 12.0)  # bits of a token at which the next colour begins
TOP_TOKENS = 5  # named in Markdown, which has no colours

LIGHT = {
    "page": "#f4f5f7",
    "card": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#59636e",
    "line": "#d5d9de",
    "accent": "#1f5fb4",
    "changed": "#fff3d1",
    "bits": ("#ffffff", "#fef0d9", "#fdd8a3", "#fbb96e", "#f09448", "#e5774e"),
    "underline": "#a8400f",
}
DARK = {
    "page": "#101214",
    "card": "#1a1d21",
    "ink": "#e7e9ec",
    "muted": "#a3abb5",
    "line": "#3a4048",
    "accent": "#7db0f5",
    "changed": "#3b3216",
    "bits": ("#1a1d21", "#35291a", "#4d3617", "#664213", "#804b14", "#8f3f26"),
    "underline": "#f0a35e",
}
# In dark pages pictures drawn on white are turned over: black for white, and every colour keeps its hue.
DARK_PICTURES = "filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen;"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Numbers:
    """The numbers to see first: (what, value, remark) each."""

    items: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of cells under `heads`; the first cell names its row. Rows whose numbers are in `marked` stand out."""

    heads: list[str]
    rows: list[list[str]]
    marked: frozenset[int] = frozenset()
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG, drawn on white. alternative: what it shows, with numbers, for those who do not see it."""

    name: str
    png: bytes
    alternative: str
    caption: str = ""


@dataclass(frozen=True)
class Gallery:
    """Blocks side by side where there is room."""

    blocks: list


@dataclass(frozen=True)
class Code:
    """Commands to copy."""

    text: str


@dataclass(frozen=True)
class Excerpt:
    """Text of a model or a data set; `lead` is what stood there before the model went on."""

    label: str
    lead: str
    text: str


@dataclass(frozen=True)
class Tokens:
    """Text in which each token has the colour of its bits: (text, bits) each."""

    label: str
    tokens: list[tuple[str, float]]


@dataclass(frozen=True)
class BitScale:
    """What the colours of `Tokens` mean."""


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on request."""

    title: str
    blocks: list


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass
class Section:
    """A part of the page with a heading."""

    title: str
    blocks: list = field(default_factory=list)


@dataclass
class Page:
    """What `html_of` and `markdown_of` write out."""

    title: str
    subtitle: str
    sections: list[Section]


# ---- HTML ----


def html_of(page: Page) -> str:
    """The page as one HTML document, pictures included."""
    parts = []
    links = []
    for number, section in enumerate(page.sections):
        links.append(f'<a href="#s{number}">{_escape(section.title)}</a>')
        blocks = "\n".join(_block(block) for block in section.blocks)
        parts.append(f'<section id="s{number}">\n<h2>{_escape(section.title)}</h2>\n{blocks}\n</section>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<title>{_escape(page.title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{_style()}</style>\n</head>\n'
        f"<body>\n<header>\n<h1>{_escape(page.title)}</h1>\n<p>{_escape(page.subtitle)}</p>\n"
        f'<nav aria-label="Contents">{" ".join(links)}</nav>\n</header>\n<main>\n'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _block(block):
    return _HTML[type(block)](block)


def _text(block):
    return f"<p>{_escape(block.text)}</p>"


def _numbers(block):
    cells = (
        f'<div><dt>{_escape(what)}</dt><dd class="value">{_escape(value)}</dd><dd>{_escape(remark)}</dd></div>'
        for what, value, remark in block.items
    )
    return f"<dl>{''.join(cells)}</dl>"


def _table(block):
    heads = "".join(f'<th scope="col">{_escape(head)}</th>' for head in block.heads)
    heads = f"<thead><tr>{heads}</tr></thead>" if any(block.heads) else ""
    rows = []
    for number, (first, *rest) in enumerate(block.rows):
        mark = ' class="changed"' if number in block.marked else ""
        cells = "".join(f"<td>{_escape(cell)}</td>" for cell in rest)
        rows.append(f'<tr{mark}><th scope="row">{_escape(first)}</th>{cells}</tr>')
    body = "\n".join(rows)
    caption = f"<caption>{_escape(block.title)}</caption>" if block.title else ""
    table = f"<table>{caption}{heads}<tbody>\n{body}\n</tbody></table>"
    return f'<div class="wide" tabindex="0">{table}</div>'  # a focus stop, so that the keyboard can scroll it sideways


def _picture(block):
    data = base64.b64encode(block.png).decode("ascii")
    width, height = png_size(block.png)
    caption = f"<figcaption>{_escape(block.caption)}</figcaption>" if block.caption else ""
    image = f'<img width="{width // 2}" height="{height // 2}" alt="{_escape(block.alternative)}"'
    return f'<figure class="picture">{image} src="data:image/png;base64,{data}">{caption}</figure>'


def _gallery(block):
    return f'<div class="gallery">{"".join(map(_block, block.blocks))}</div>'


def _code(block):
    return f'<pre class="code" tabindex="0">{_escape(block.text)}</pre>'


def _excerpt(block):
    lead = f"<b>{_escape(block.lead)}</b>" if block.lead else ""
    return f"<figure><figcaption>{_escape(block.label)}</figcaption><pre>{lead}{_escape(block.text)}</pre></figure>"


def _tokens(block):
    spans = []
    for text, bits in block.tokens:
        shown = _escape(text.replace("\n", "⏎\n"))
        told = "not measured" if math.isnan(bits) else f"{bits:.1f} bits"
        spans.append(f'<span class="b{bit_level(bits)}" title="{told}">{shown}</span>')
    return f"<figure><figcaption>{_escape(block.label)}</figcaption><pre>{''.join(spans)}</pre></figure>"


def _bit_scale(block):
    spans = (f'<span class="b{level}">{name}</span>' for level, name in enumerate(bit_level_names()))
    return f'<p class="scale">Bits of a token: {" ".join(spans)}</p>'


def _fold(block):
    return f"<details><summary>{_escape(block.title)}</summary>\n" + "\n".join(map(_block, block.blocks)) + "</details>"


def _heading(block):
    return f"<h3>{_escape(block.text)}</h3>"


_HTML = {
    Text: _text, Numbers: _numbers, Table: _table, Picture: _picture, Gallery: _gallery, Code: _code,
    Excerpt: _excerpt, Tokens: _tokens, BitScale: _bit_scale, Fold: _fold, Heading: _heading,
}  # fmt: skip


def _escape(text):
    """`text` for HTML, in an element or a quoted attribute."""
    return html.escape(printable(text), quote=True)


def printable(text: str) -> str:
    """`text` with what is not to be printed as visible characters: control characters as their pictures, and halves of
    surrogate pairs and characters that turn the direction of writing as replacement characters.
    """
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return re.sub(r"[\x7f-\x9f\ud800-\udfff\ufffe\uffff\u200e\u200f\u2028-\u202e\u2066-\u2069]", "\ufffd", text)


def png_size(png: bytes) -> tuple[int, int]:
    """(width, height) in pixels, from the PNG's header."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n", png[:8]
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def bit_level(bits: float) -> int:
    """Which of the colours a token of so many bits has; 0 where it was not measured."""
    return sum(bits >= edge for edge in BIT_EDGES)


def bit_level_names() -> list[str]:
    """The range of bits of each colour, in words."""
    between = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(BIT_EDGES)]
    return [f"under {BIT_EDGES[0]:g}", *between, f"{BIT_EDGES[-1]:g} and more"]


def _style():
    """The style sheet."""
    sheet = (
        _variables(LIGHT)
        + f"@media (prefers-color-scheme: dark) {{ {_variables(DARK)} .picture img {{ {DARK_PICTURES} }} }}\n"
    )
    # not by colour alone: the more bits, the heavier the line below
    lines = ("none", "1px dotted", "1px solid", "2px solid", "3px solid", "4px double")
    for level, line in enumerate(lines):
        border = f"border-bottom: {line} var(--underline); box-shadow: inset -1px 0 var(--card);" if level else ""
        sheet += f".b{level} {{ background: var(--bits{level}); {border} }}\n"
    return sheet + STYLE


def _variables(theme):
    colours = {name: colour for name, colour in theme.items() if name != "bits"}
    colours |= {f"bits{level}": colour for level, colour in enumerate(theme["bits"])}
    return ":root { " + " ".join(f"--{name}: {colour};" for name, colour in colours.items()) + " }\n"


STYLE = """\
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 20px 48px; max-width: 1180px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 20px; }
h3 { margin: 20px 0 8px; font-size: 16px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; overflow-wrap: anywhere; }
header p, figcaption, dt, dd, .scale { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 20px; }
a, summary { color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px; margin: 0 0 16px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(135px, 1fr)); gap: 18px 16px; margin: 0 0 12px; }
dl div { display: flex; flex-direction: column; }
dt, dd { margin: 0; font-size: 14px; line-height: 1.35; }
dt { color: var(--ink); }
dd.value { order: -1; color: var(--ink); font-size: 22px; font-weight: 700; font-variant-numeric: tabular-nums; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure { margin: 0 0 12px; min-width: 0; }
figcaption { font-size: 14px; margin: 4px 0; }
.picture img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; margin: 0 0 12px; }
caption { text-align: left; white-space: nowrap; font-size: 16px; font-weight: 700; margin: 8px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tbody th { font-weight: normal; }
thead th { color: var(--muted); font-weight: 600; }
tr.changed > * { background: var(--changed); font-weight: 600; }
pre { margin: 0; font: 13px/1.7 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: break-spaces; overflow-wrap: anywhere; unicode-bidi: isolate; background: var(--card); }
figure pre { border-left: 3px solid var(--line); padding: 2px 0 2px 12px; }
pre.code { border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; margin: 0 0 12px; }
.scale span { color: var(--ink); padding: 1px 6px; }
details { margin: 0 0 12px; }
summary { cursor: pointer; margin: 0 0 8px; }
@media (max-width: 600px) { body { padding: 16px 10px 32px; } section { padding: 14px; } }
"""


# ---- Markdown ----


def markdown_of(page: Page) -> str:
    """The page as Markdown; pictures are links to `<name>.png` beside it."""
    lines = [f"# {_inline(page.title)}", _inline(page.subtitle)]
    for section in page.sections:
        lines += [f"## {_inline(section.title)}", *(text for block in section.blocks for text in _markdown(block))]
    return "\n\n".join(lines) + "\n"


def _markdown(block):
    """The paragraphs of a block."""
    match block:
        case Text(text):
            return [_inline(text)]
        case Heading(text):
            return [f"### {_inline(text)}"]
        case Numbers(items):
            return _markdown(Table(["", "", ""], items))
        case Table(heads, rows, marked, title):
            lines = [heads, ["---"] * len(heads)]
            lines += [
                [f"**{cell}**" if n in marked and cell else cell for cell in map(_inline, row)]
                for n, row in enumerate(rows)
            ]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            return [*([f"**{_inline(title)}**"] if title else []), table]
        case Picture(name, _, alternative, caption):
            return [f"![{_inline(alternative)}]({name}.png)", *([_inline(caption)] if caption else [])]
        case Gallery(blocks):
            return [text for inner in blocks for text in _markdown(inner)]
        case Code(text):
            return [_fenced(text)]
        case Excerpt(label, lead, text):
            return [f"{_inline(label)}:", _fenced(lead + text)]
        case Tokens(label, tokens):
            costly = sorted((token for token in tokens if token[1] == token[1]), key=lambda token: -token[1])
            named = ", ".join(f"{_inline(repr(text))} {bits:.1f}" for text, bits in costly[:TOP_TOKENS])
            text = "".join(text for text, _ in tokens)
            return [f"{_inline(label)}:", _fenced(text), *([f"Most bits: {named}"] if named else [])]
        case BitScale():
            return []
        case Fold(title, blocks):
            return [f"### {_inline(title)}", *(text for inner in blocks for text in _markdown(inner))]
    raise TypeError(block)


def _inline(text):
    """`text` as Markdown of one line in which nothing has a meaning, also in a table and a link."""
    text = html.escape(printable(" ".join(text.split())), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)


def _fenced(text):
    """`text` in a block of code that it cannot end itself."""
    ticks = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
    return f"{ticks}\n{printable(text)}\n{ticks}"

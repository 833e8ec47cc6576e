"""Draw the pictures of README.md and docs/how_it_works.md.

python dev/drawings.py           docs/data_order.svg and docs/training_step.svg
python dev/drawings.py FOLDER    docs/run.svg, the curves of the run in this folder
"""

import hashlib
import sys
from html import escape
from pathlib import Path

from nanotrain.report import data, pictures

DOCS = Path(__file__).parent.parent / "docs"
WIDTH = 760
INK, FAINT, PAPER = "#24292f", "#6a737d", "#fcfcfa"  # dark on light, on any page
SHARDS = {"a": "#cfe3fa", "b": "#fde2c8", "c": "#d3efdc"}
STREAMS = ["#e3dcf8", "#f8d7e3", "#d5efef", "#f1ecc0"]
GROUPS, EPOCHS, SEED = 4, 2, 1337


class Drawing:
    """An SVG under construction."""

    def __init__(self, height: int, title: str):
        self.height = height
        self.parts = [f"<title>{escape(title)}</title>"]
        self.parts.append(f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{PAPER}" stroke="#d0d7de"/>')

    def text(self, x: float, y: float, words: str, size: int = 14, anchor: str = "start", style: str = "") -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {style}>{escape(words)}</text>'
        )

    def heading(self, y: float, words: str, more: str = "") -> None:
        self.text(24, y, words, 15, style='font-weight="bold"')
        self.text(24, y + 19, more, 13, style=f'fill="{FAINT}"')

    def box(self, x: float, y: float, width: float, height: float, fill: str, words: str = "", size: int = 14) -> None:
        """A rectangle with centered lines of text."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{FAINT}"/>'
        )
        lines = words.split("\n")
        top = y + height / 2 + size * (0.36 - 0.65 * (len(lines) - 1))
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 1.3 * size * number, line, size, "middle")

    def arrow(self, x: float, y: float, length: float) -> None:
        """A downward arrow from (x, y)."""
        end = y + length
        self.parts.append(f'<path d="M{x} {y}V{end}m-5 -6l5 6l5 -6" fill="none" stroke="{FAINT}" stroke-width="1.5"/>')

    def write(self, name: str) -> None:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}"'
        head += f' font-family="system-ui, sans-serif" fill="{INK}">'
        (DOCS / name).write_text("\n".join([head, *self.parts, "</svg>\n"]), encoding="utf-8")


def slice_order() -> list[str]:
    """The slices of three shards over two epochs, in the order of nanotrain.dataloader.SliceOrder."""
    names = [f"{shard}{group}" for shard in SHARDS for group in range(GROUPS)]

    def key(epoch: int, name: str) -> bytes:
        shard = f"shard_{'abc'.index(name[0]):05d}.parquet"
        return hashlib.sha256(f"{SEED} {epoch} {shard}:{name[1]}:0".encode()).digest()

    return [name for epoch in range(EPOCHS) for name in sorted(names, key=lambda name: key(epoch, name))]


def data_order() -> None:
    drawing, order, streams = Drawing(716, "From shards to the sequences of each rank"), slice_order(), len(STREAMS)
    drawing.heading(
        32,
        "Shards",
        "A slice is a row group of a shard, or an equal part of one where there are fewer than two per stream.",
    )
    for number, (shard, colour) in enumerate(SHARDS.items()):
        left = 24 + 240 * number
        drawing.box(left, 64, 224, 64, "none")
        drawing.text(left + 10, 82, f"shard_{number:05d}.parquet", 13)
        for group in range(GROUPS):
            drawing.box(left + 10 + 52 * group, 92, 48, 28, colour, f"{shard}{group}")
    drawing.arrow(380, 134, 20)

    drawing.heading(
        178,
        "Order of the slices",
        "In each epoch they are sorted by the SHA-256 of (seed, epoch, slice). The order has no end.",
    )
    for position, name in enumerate(order[:16]):
        drawing.box(24 + 44 * position, 208, 42, 28, SHARDS[name[0]], name)
        drawing.text(45 + 44 * position, 251, str(position), 12, "middle", f'fill="{FAINT}"')
    drawing.parts.append(f'<path d="M{23 + 44 * 12} 202V256" stroke="{INK}" stroke-dasharray="4 3"/>')
    drawing.text(29 + 44 * 12, 268, "epoch 1", 12)
    drawing.arrow(380, 262, 20)

    drawing.heading(
        306,
        "Streams of tokens (4 here; 192 unless row groups are huge)",
        "Stream s reads the slices at s, s + 4, s + 8, ...: each document after a BOS token.",
    )
    for stream, colour in enumerate(STREAMS):
        y = 336 + 32 * stream
        drawing.text(24, y + 19, f"stream {stream}")
        for number, name in enumerate(order[stream::streams]):
            drawing.box(96 + 48 * number, y, 46, 26, SHARDS[name[0]], name)
        drawing.text(104 + 48 * 6, y + 19, "...")
        drawing.box(440, y, 296, 26, colour, "BOS tokens BOS tokens tokens BOS ...", 13)
    drawing.arrow(380, 468, 20)

    drawing.heading(
        512, "Sequences of the run", "Sequence n is the next T tokens of stream n mod 4, whoever trains on it."
    )
    for number in range(8):
        drawing.box(24 + 89 * number, 542, 87, 28, STREAMS[number % streams], f"n = {number}")
    drawing.arrow(380, 576, 20)
    drawing.heading(
        620, "Ranks", "Rank r of W trains on the n with n mod W = r: a batch holds the same sequences for every W."
    )
    for left, ranks in ((24, 1), (276, 2), (528, 4)):
        drawing.text(left, 662, f"W = {ranks}", 13, style='font-weight="bold"')
        for rank in range(ranks):
            x = left + 208 * rank / ranks
            drawing.box(x, 670, 204 / ranks, 28, "#eef0f2", " ".join(map(str, range(rank, 8, ranks))), 13)
    drawing.write("data_order.svg")


ALL, ONE = "#fdeeb5", "#e3ecf7"  # colours of what ranks do together and alone
STEPS = {  # {heading: one text per rank, or a single text for both}
    "Batch": ("sequences 0, 2, 4, ...", "sequences 1, 3, 5, ..."),
    "Forward": ("matrix products in bfloat16,\nweights in float32",) * 2,
    "Loss": ("logits of some rows at a time,\nwith their gradient",) * 2,
    "Backward": ("adds to the gradients (float32)",) * 2,
    "Average": "last micro-step only: gradients are averaged, bucket by bucket,\nduring the backward pass; "
    "the bigram table's rows after it",
    "Check": "one reduction of loss, gradient norm, stop request and data hash;\n"
    "not finite on any rank: no rank updates",
    "Update": (
        "AdamW: first half of the elements\nMuon: half of the matrices",
        "AdamW: second half\nMuon: the other matrices",
    ),
    "Send": "each rank sends its half while it updates the next group;\n"
    "the bigram table, which all ranks update, needs no sending",
    "Weights": ("the same bits", "the same bits"),
}
MICRO_STEP = 5  # the first five happen in every micro-step


def training_step() -> None:
    height, gap, top = 50, 22, 72
    drawing = Drawing(top + len(STEPS) * (height + gap) + 30, "One training step on two ranks")
    drawing.text(24, 32, "One training step on two ranks", 15, style='font-weight="bold"')
    for rank in range(2):
        drawing.text(286 + 300 * rank, 56, f"rank {rank}", 14, "middle", 'font-weight="bold"')
    frame = f'width="{WIDTH - 24}" height="{MICRO_STEP * (height + gap) - 2}" rx="6" fill="none" stroke="{INK}"'
    drawing.parts.append(f'<rect x="12" y="{top - 10}" {frame} stroke-dasharray="5 4"/>')
    drawing.text(24, top - 16, "once per micro-step:", 13)
    for number, (heading, what) in enumerate(STEPS.items()):
        y = top + number * (height + gap)
        drawing.text(24, y + height / 2 + 5, heading, style='font-weight="bold"')
        if isinstance(what, str):
            drawing.box(146, y, 580, height, ALL, what)
        else:
            for rank, words in enumerate(what):
                drawing.box(146 + 300 * rank, y, 280, height, ONE, words)
        for rank in range(2 if number + 1 < len(STEPS) else 0):
            drawing.arrow(286 + 300 * rank, y + height + 3, gap - 6)
    y = drawing.height - 26
    drawing.box(146, y, 16, 14, ONE)
    drawing.text(168, y + 12, "each rank by itself", 13)
    drawing.box(326, y, 16, 14, ALL)
    drawing.text(348, y + 12, "all ranks together", 13)
    drawing.write("training_step.svg")


def run_curves(folder: Path) -> None:
    drawing, drawn = Drawing(216, "Training loss and validation bits per byte"), pictures.draw([data.read_run(folder)])
    for x, name in ((8, "loss"), (384, "bits_per_byte")):
        place = f'<svg x="{x}" y="6" width="368" height="204" color="{INK}" '
        drawing.parts.append(drawn[name].replace("<svg ", place, 1))
    drawing.write("run.svg")


if __name__ == "__main__":
    DOCS.mkdir(exist_ok=True)
    if sys.argv[1:]:
        run_curves(Path(sys.argv[1]))
    else:
        data_order()
        training_step()

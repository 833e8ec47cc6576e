"""Task bundles for the CORE metric: read one, download the public one, or make one from your own validation text.

A bundle is a folder or a zip file:

    core.yaml             icl_tasks: [{label, dataset_uri, num_fewshot: [n], icl_task_type, continuation_delimiter}]
    eval_meta_data.csv    columns "Eval Task" and "Random baseline" (in percent), among others
    eval_data/<uri>       one JSON object per line: {query, choices, gold} for multiple_choice, {context_options,
                          continuation, gold} for schema, {context, continuation} for language_modeling
"""

import contextlib
import csv
import hashlib
import io
import json
import random
import re
import zipfile
from collections import namedtuple
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import yaml

from nanotrain import dataset, files, paths
from nanotrain.dist import DistContext
from nanotrain.errors import DataError, first_line
from nanotrain.terminal import progress_bar

OWN = "own"  # instead of a path: tasks made from the validation shard
OWN_ITEMS = 200  # maximum number of items per own task
URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
ZIP_NAME = "eval_bundle.zip"
ITEM_SEED = 1337  # seed of the published metric's item shuffle

MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING = KINDS = ("multiple_choice", "schema", "language_modeling")
CORE_LABELS = frozenset(
    "hellaswag_zeroshot jeopardy bigbench_qa_wikidata arc_easy arc_challenge copa commonsense_qa piqa openbook_qa "
    "lambada_openai hellaswag winograd winogrande bigbench_dyck_languages agi_eval_lsat_ar bigbench_cs_algorithms "
    "bigbench_operators bigbench_repeat_copy_logic squad coqa boolq bigbench_language_identification".split()
)

MARK = "# Made by nanotrain"  # prefix of a core.yaml that may be overwritten
OWN_SEED = 20
CONTEXT_WORDS, CONTINUATION_WORDS = 30, 10  # number of words: maximum; exact
CONTEXT_CHARS, CONTINUATION_CHARS = 400, 120  # maximum number of characters
MAX_DOCUMENTS = 4000  # documents read from the shard
MAX_DOCUMENT_CHARS = 1_000_000  # leading characters of each document to draw from
TRIES = 40  # draws per item

Piece = namedtuple("Piece", "document context continuation")  # context and continuation are one space apart in the text


@dataclass(frozen=True)
class Task:
    """One task. An item is (options, index of the correct one); an option is (text, answer)."""

    label: str
    kind: str  # MULTIPLE_CHOICE, SCHEMA or LANGUAGE_MODELING
    num_shots: int  # solved examples before each item
    delimiter: str  # between text and answer
    baseline: float  # accuracy of random guessing, in [0, 1)
    items: list[tuple[list[tuple[str, str]], int]]


@dataclass(frozen=True)
class Bundle:
    """Tasks and a hash of their files. Scores are comparable only for equal hashes."""

    tasks: list[Task]
    sha256: str


def read(path: str | Path, max_per_task: int = 0) -> Bundle:
    """Read the bundle at `path`, a folder or a zip file, up to `max_per_task` items of each task (0: all).
    Items are shuffled first, as in the published metric. Raises DataError that names the file and line.
    """
    path, place, digest, tasks = paths.absolute(path), "core.yaml", hashlib.sha256(), []
    if not path.exists():
        raise DataError(f"no CORE bundle at {path}: make one with python -m nanotrain.core_eval --make-bundle={path}")

    def text(name):
        nonlocal place
        place = name
        data = (root / name).read_bytes()
        digest.update(len(data).to_bytes(8, "little") + data)
        return data.decode("utf-8")

    try:
        with zipfile.ZipFile(path) if path.is_file() else contextlib.nullcontext() as file:
            root = zipfile.Path(file) if file else path
            if not (root / "core.yaml").is_file():
                root = root / "eval_bundle"  # the top folder of the public zip
            entries = yaml.safe_load(text("core.yaml"))["icl_tasks"]
            rows = csv.DictReader(io.StringIO(text("eval_meta_data.csv")))  # CORE does not use "Random baseline v2"
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
            for entry in entries:
                place = f"core.yaml, {entry}"
                label, kind, uri = entry["label"], entry["icl_task_type"], entry["dataset_uri"]
                delimiter, (num_shots,) = str(entry.get("continuation_delimiter", " ")), entry["num_fewshot"]
                baseline, items = baselines[label], []
                if kind not in KINDS or num_shots < 0 or not 0 <= baseline < 1:
                    raise ValueError("not a task")
                for number, line in enumerate(text(f"eval_data/{uri}").split("\n"), 1):
                    place = f"{uri}, line {number}"
                    if line.strip():
                        items.append(parse_item(kind, json.loads(line)))
                if not items:
                    raise ValueError("no items")
                random.Random(ITEM_SEED).shuffle(items)
                tasks.append(Task(label, kind, num_shots, delimiter, baseline, items[: max_per_task or None]))
            if not tasks:
                raise ValueError("no tasks")
    except Exception as error:  # a corrupt file can raise almost anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{path}: cannot read {place} ({reason}): delete it and download or make it again") from None
    return Bundle(tasks, digest.hexdigest())


def parse_item(kind: str, entry: object) -> tuple[list[tuple[str, str]], int]:
    """Convert one JSON entry of a task file to an item (see Task). Raises ValueError if it does not fit `kind`."""
    match kind, entry:
        case "multiple_choice", {"query": query, "choices": [_, _, *_] as choices, "gold": int(gold)}:
            options = [(query, choice) for choice in choices]
        case "schema", {"context_options": [_, _, *_] as contexts, "continuation": continuation, "gold": int(gold)}:
            options = [(context, continuation) for context in contexts]
        case "language_modeling", {"context": str(context), "continuation": continuation} if continuation:
            options, gold = [(context.strip(), continuation)], 0
        case _:
            options, gold = [], 0
    if not 0 <= gold < len(options) or not all(isinstance(text, str) for text in chain(*options)):
        raise ValueError(f"not a {kind} item")
    return options, gold


def fetch() -> Path:
    """Path of the public bundle, downloaded if necessary. Raises DataError."""
    path = paths.base_dir() / "core" / ZIP_NAME
    if not path.is_file():
        from nanotrain import download  # here, because it imports requests, which takes a while

        with progress_bar(None, "CORE bundle", unit="B", unit_scale=True) as bar:
            _, failed = download.fetch_all({ZIP_NAME: URL}, path.parent, read, bar.update)
        if failed:
            raise DataError(failed[ZIP_NAME])
    return path


def own(shard: Path) -> Path:
    """Folder of the tasks made from a validation shard, named after its SHA-256; made if necessary."""
    folder = paths.base_dir() / "core" / f"tasks-{files.file_sha256(shard)[:16]}"
    if not folder.is_dir():
        make(folder, shard, OWN_ITEMS)
    return folder


def obtain(path: str, shard: Path, dist: DistContext, max_per_task: int) -> Bundle | None:
    """Read the bundle at `path` on every rank; OWN: tasks made from the validation `shard`; "": the public bundle.
    Returns None, after printing the reason, if the public bundle is not available.
    """
    if path == OWN:
        path = dist.on_rank0(lambda: str(own(shard)))
    try:
        path = path or dist.on_rank0(lambda: str(fetch()))
    except DataError as error:
        dist.print0(f"CORE skipped (choose other tasks with --core-bundle=PATH): {error}")
        return None
    return dist.on_all_ranks(lambda: read(path, max_per_task))


def make(folder: str | Path, shard: Path, num_items: int) -> dict[str, int]:
    """Make a bundle of up to `num_items` items per task from a validation `shard` and write it to `folder`.

    Deterministic. Returns {label: number of items}, without tasks that have none. A bundle made by this function is
    overwritten; raises UserError if the folder holds anything else.
    """
    texts = list(islice(dataset.read_shards([shard], MAX_DOCUMENT_CHARS), MAX_DOCUMENTS))
    tasks = [task for task in _own_tasks(texts, num_items) if task[-1]]
    baselines, entries = "Eval Task,Random baseline\n", []
    with files.new_folder(paths.absolute(folder), _check_replaceable) as temporary:
        (temporary / "eval_data" / "own").mkdir(parents=True)
        for label, kind, num_shots, baseline, items in tasks:
            uri, lines = f"own/{label}.jsonl", [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
            (temporary / "eval_data" / uri).write_text("".join(lines), encoding="utf-8", newline="\n")
            entries.append({"label": label, "dataset_uri": uri, "num_fewshot": [num_shots], "icl_task_type": kind})
            baselines += f"{label},{baseline}\n"
        (temporary / "eval_meta_data.csv").write_text(baselines, encoding="utf-8")
        mark = f"{MARK}: {num_items} items a task from a shard with SHA-256 {files.file_sha256(shard)}\n"
        (temporary / "core.yaml").write_text(mark + yaml.safe_dump({"icl_tasks": entries}, sort_keys=False), "utf-8")
    return {label: len(items) for label, *_, items in tasks}


def _check_replaceable(folder):
    """Raise UserError unless `folder` is empty or a bundle written by `make`."""
    core = folder / "core.yaml"
    if not core.is_file() or not core.read_bytes().startswith(MARK.encode()):
        files.check_empty(folder)


def _own_tasks(texts, num_items):
    """[(label, kind, number of shots, baseline in percent, items)]. The order of the draws determines the result."""
    draw = random.Random(OWN_SEED)
    pieces = _distinct(lambda: _draw_piece(texts, draw, CONTINUATION_WORDS), num_items)
    repeated = _distinct(lambda: _draw_repeated_word(texts, draw), num_items)
    last_word = [{"context": piece.context, "continuation": piece.continuation} for piece in repeated]
    found = _with_distractors(pieces, draw, 3, "continuation")
    next_piece = [{"query": piece.context, "choices": options, "gold": gold} for piece, options, gold in found]
    found = _with_distractors(pieces, draw, 1, "context")
    which_context = [{"context_options": o, "continuation": p.continuation, "gold": gold} for p, o, gold in found]
    words = sorted({word for text in texts[:200] for word in re.findall(r"[^\W\d_]{3,8}", text)})
    copies = _distinct(lambda: " ".join(draw.sample(words, draw.randint(2, 4))), num_items if len(words) >= 4 else 0)
    copy = [{"context": f"Copy: {text}\nCopy:", "continuation": text} for text in copies]
    opened = _distinct(lambda: " ".join(draw.choices("([{<", k=draw.randint(2, 5))), num_items)
    closing = str.maketrans("([{<", ")]}>")
    brackets = [{"context": f"Open: {text}\nClose:", "continuation": text[::-1].translate(closing)} for text in opened]
    return [
        ("last_word", LANGUAGE_MODELING, 0, 0, last_word),
        ("next_piece", MULTIPLE_CHOICE, 0, 25, next_piece),
        ("which_context", SCHEMA, 0, 50, which_context),
        ("copy", LANGUAGE_MODELING, 3, 0, copy),
        ("brackets", LANGUAGE_MODELING, 3, 0, brackets),
    ]


def _distinct(drawn, num_items):
    """Up to `num_items` distinct results of drawn(), except None."""
    found = {}
    for _ in range(TRIES * num_items):
        if len(found) < num_items and (item := drawn()) is not None:
            found[item] = None
    return list(found)


def _draw_piece(texts, draw, num_words):
    """A Piece from a random place in a random document, its continuation `num_words` long; None if none fits there."""
    if not texts:
        return None
    document = draw.randrange(len(texts))
    place = draw.randrange(len(texts[document]))
    begin = max(place - CONTEXT_CHARS, 0)
    text = texts[document][begin : place + CONTINUATION_CHARS]
    words = list(re.finditer(r"\S+", text))[1:-1]  # the outer words may be truncated
    middle = sum(word.start() < place - begin for word in words)
    before, after = words[max(middle - CONTEXT_WORDS, 0) : middle], words[middle : middle + num_words]
    if min(len(before), len(after)) < num_words or text[before[-1].end() : after[0].start()] != " ":
        return None
    return Piece(document, text[before[0].start() : before[-1].end()], text[after[0].start() : after[-1].end()])


def _draw_repeated_word(texts, draw):
    """A Piece with a one-word continuation that also occurs in its context and so can be guessed; or None."""
    piece = _draw_piece(texts, draw, 1)
    fits = piece and len(piece.continuation) > 3 and piece.continuation.isalpha()
    return piece if fits and piece.continuation in re.findall(r"\w+", piece.context) else None


def _with_distractors(pieces, draw, num_others, part):
    """Yield (piece, options, gold): the `part` of each piece shuffled among those of `num_others` pieces from other
    documents with different continuations. Pieces without enough of these are skipped.
    """
    for piece in pieces:
        others = {other.continuation: other for other in pieces if other.document != piece.document}
        others.pop(piece.continuation, None)
        if len(others) >= num_others:
            options = [getattr(one, part) for one in (piece, *draw.sample(list(others.values()), num_others))]
            if len(set(options)) == len(options):
                draw.shuffle(options)
                yield piece, options, options.index(getattr(piece, part))

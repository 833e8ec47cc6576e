"""The tasks of CORE as files: reading a bundle, fetching the public one, making one from your own validation text.

A bundle is a folder, or a zip of one:

    core.yaml             icl_tasks: label, dataset_uri, num_fewshot [n], icl_task_type, continuation_delimiter of each
    eval_meta_data.csv    columns "Eval Task" and "Random baseline" (in percent), among others
    eval_data/<uri>       a JSON object a line, an item: {query, choices, gold} for multiple_choice, {context_options,
                          continuation, gold} for schema, {context, continuation} for language_modeling
"""

import csv
import hashlib
import io
import json
import random
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from tqdm import tqdm

from nanotrain import dataset, download, files
from nanotrain.errors import DataError, UserError, first_line

if TYPE_CHECKING:
    from nanotrain.dist import DistContext

OWN = "own"  # instead of a path: the tasks of a data set's validation shard
URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
ZIP_NAME, HASH_NAME = "eval_bundle.zip", "eval_bundle.zip.sha256"
ITEM_SEED = 1337  # of the order of a task's items, as published

MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING = "multiple_choice", "schema", "language_modeling"
CORE_LABELS = frozenset(
    "hellaswag_zeroshot jeopardy bigbench_qa_wikidata arc_easy arc_challenge copa commonsense_qa piqa openbook_qa "
    "lambada_openai hellaswag winograd winogrande bigbench_dyck_languages agi_eval_lsat_ar bigbench_cs_algorithms "
    "bigbench_operators bigbench_repeat_copy_logic squad coqa boolq bigbench_language_identification".split()
)

MARK = "# Made by nanotrain"  # how core.yaml begins where it may be replaced
OWN_SEED = 20  # of what is drawn
CONTEXT_WORDS, CONTINUATION_WORDS = 30, 10  # at most, and exactly
CONTEXT_CHARS, CONTINUATION_CHARS = 400, 120  # at most
MAX_DOCUMENTS = 4000  # of the shard
TRIES = 40  # for each item
NUM_CHOICES = 4
COPIED_WORDS = (2, 4)
OPENING, CLOSING = "([{<", ")]}>"
OPEN_BRACKETS = (2, 5)

OWN_TASKS = (  # label, kind, shots, baseline in percent
    ("last_word", LANGUAGE_MODELING, 0, 0),
    ("next_piece", MULTIPLE_CHOICE, 0, 100 / NUM_CHOICES),
    ("which_context", SCHEMA, 0, 50),
    ("copy", LANGUAGE_MODELING, 3, 0),
    ("brackets", LANGUAGE_MODELING, 3, 0),
)


@dataclass(frozen=True)
class Task:
    """One task: its items in the order in which they are asked, how many solved ones stand before each, what stands
    between question and answer, and the accuracy of guessing, in [0, 1].
    """

    label: str
    kind: str  # one of the three above
    num_shots: int
    delimiter: str
    baseline: float
    items: tuple[dict, ...]


@dataclass(frozen=True)
class Bundle:
    """Tasks, and a hash of all that was read for them: scores of different hashes cannot be compared."""

    tasks: tuple[Task, ...]
    sha256: str

    @property
    def is_core(self) -> bool:
        """Whether these are the 22 tasks of DCLM CORE, so that their mean may be called by that name."""
        return {task.label for task in self.tasks} == CORE_LABELS


# ---- reading ----


def read(path: str | Path, max_per_task: int = 0) -> Bundle:
    """The bundle at `path`, a folder or a zip; with `max_per_task` only the first so many items of each task.

    Items are shuffled before they are cut, as published. Raises DataError that names the file and the line.
    """
    with _opened(Path(path).expanduser()) as root:
        digest = hashlib.sha256()
        try:
            settings = yaml.safe_load(_text(root, "core.yaml", digest))["icl_tasks"]
            described = [_described(task) for task in settings]
        except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"{path}, core.yaml: not a list of tasks ({first_line(error)}): get it again") from None
        labels = [label for label, *_ in described]
        if not labels or len(set(labels)) < len(labels):
            raise DataError(f"{path}, core.yaml: no task, or two of one name: get it again")
        baselines = _baselines(path, _text(root, "eval_meta_data.csv", digest))
        missing = [label for label in labels if label not in baselines]
        if missing:
            raise DataError(f"{path}, eval_meta_data.csv: no random baseline of {', '.join(missing)}: get it again")
        tasks = []
        for label, uri, num_shots, kind, delimiter in described:
            lines = _text(root, f"eval_data/{uri}", digest).split("\n")
            items = [
                _item(f"{path}, {uri}, line {number}", kind, line)
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
            if not items:
                raise DataError(f"{path}, {uri}: no items: get it again")
            random.Random(ITEM_SEED).shuffle(items)
            tasks.append(
                Task(label, kind, num_shots, delimiter, baselines[label], tuple(items[: max_per_task or None]))
            )
    return Bundle(tuple(tasks), digest.hexdigest())


class _opened:
    """`with _opened(path) as root:` the folder of core.yaml, inside a zip or not: it, or its only subfolder of the
    public zip, `eval_bundle`.
    """

    def __init__(self, path):
        self.path, self.file = path, None

    def __enter__(self):
        root = self.path
        if root.is_file():
            try:
                self.file = zipfile.ZipFile(root)
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(
                    f"{root} is not a readable zip ({first_line(error)}): delete it and get it again"
                ) from None
            root = zipfile.Path(self.file)
        elif not root.is_dir():
            raise DataError(
                f"no CORE bundle at {root}: python -m nanotrain.core_eval --make-bundle={root} makes one of your data"
            )
        return root if (root / "core.yaml").is_file() else root / "eval_bundle"

    def __exit__(self, *error):
        if self.file:
            self.file.close()


def _text(root, name, digest):
    """The text of a file of the bundle, which also goes into `digest`."""
    try:
        data = root.joinpath(name).read_bytes()
        digest.update(len(data).to_bytes(8, "little") + data)
        return data.decode("utf-8")
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, UnicodeDecodeError) as error:
        raise DataError(f"{root}: {name} cannot be read ({first_line(error)}): get this bundle again") from None


def _described(task):
    """(label, uri, shots, kind, delimiter) of an entry of core.yaml; raises ValueError, KeyError or TypeError."""
    label, uri, shots, kind = task["label"], task["dataset_uri"], task["num_fewshot"], task["icl_task_type"]
    delimiter = task.get("continuation_delimiter", " ")
    if kind not in (MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING):
        raise ValueError(f"icl_task_type {kind!r} of {label}")
    if not all(isinstance(text, str) for text in (label, uri, delimiter)) or ".." in Path(uri).parts or uri[:1] == "/":
        raise ValueError(f"label, dataset_uri or continuation_delimiter of {label}")
    (num_shots,) = shots
    if type(num_shots) is not int or num_shots < 0:
        raise ValueError(f"num_fewshot {shots} of {label}")
    return label, uri, num_shots, kind, delimiter


def _baselines(path, text):
    """{label: accuracy of guessing}. The column is that of DCLM v1; a second one, of v2, is not used."""
    try:
        found = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(io.StringIO(text))}
        if not all(0 <= baseline < 1 for baseline in found.values()):
            raise ValueError("one is not in [0, 100)")
        return found
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path}, eval_meta_data.csv: no random baselines ({first_line(error)}): get it again"
        ) from None


def _item(place, kind, line):
    """The item of one line, checked."""
    try:
        item = json.loads(line)
        if kind == LANGUAGE_MODELING:
            good = isinstance(item["context"], str) and isinstance(item["continuation"], str) and item["continuation"]
        else:
            options, text = ("choices", "query") if kind == MULTIPLE_CHOICE else ("context_options", "continuation")
            listed, gold = item[options], item["gold"]
            good = isinstance(item[text], str) and isinstance(listed, list) and all(isinstance(o, str) for o in listed)
            good = good and len(listed) > 1 and type(gold) is int and 0 <= gold < len(listed)
        if not good:
            raise ValueError("a field has another type or range")
        return item
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{place}: no {kind} item ({first_line(error)}): get this bundle again") from None


# ---- the public bundle ----


def fetch(folder: Path, url: str = URL) -> Path:
    """The path of the public bundle in `folder`, fetched if it is not there, as it was when its hash was noted.

    Its host publishes no hash, so that of the first good download (one that reads as a bundle) is kept beside it, and
    a file that no longer has it is fetched again. One without such a hash was put there by hand, and stays. Raises
    DataError, soon if the host is silent.
    """
    path, noted = folder / ZIP_NAME, folder / HASH_NAME
    if path.is_file():
        if not noted.is_file() or noted.read_text(encoding="utf-8").strip() == files.file_sha256(path):
            return path
    with tqdm(None, "CORE bundle", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        item = download.Item(ZIP_NAME, url)
        done, failed = download.fetch_all([item], folder, read, bar.update, first_contact=True)
    if failed:
        raise DataError(failed[ZIP_NAME])
    with files.atomic_file(noted) as temporary:
        temporary.write_text(done[ZIP_NAME] + "\n", encoding="utf-8")
    return path


def own_folder(folder: Path, shard: Path) -> Path:
    """Where in `folder` the tasks of a validation shard are: found by the shard's content, whatever its data set is
    called.
    """
    return folder / f"tasks-{files.file_sha256(shard)[:16]}"


def obtain(
    path: str, folder: Path, shard: Path, dist: "DistContext", max_per_task: int, say: Callable[[str], object]
) -> Bundle | None:
    """The Bundle at `path`, or OWN that of the validation `shard`, or without one the public bundle in `folder`, on
    every rank; where that cannot be had None, and `say` is called with the reason.
    """
    if path == OWN:
        path = dist.on_rank0(lambda: str(own_folder(folder, shard)))
    if not path:
        try:
            path = dist.on_rank0(lambda: str(fetch(folder)))
        except DataError as error:
            say(f"CORE is skipped (--core-bundle=PATH gives other tasks): {error}")
            return None
    return dist.on_all_ranks(lambda: read(path, max_per_task))


# ---- a bundle of one's own text ----


def make(folder: str | Path, shard: Path, num_items: int) -> dict[str, int]:
    """Write a bundle of up to `num_items` items a task, made of the text of a validation `shard`, to `folder`.

    The same shard gives the same bytes. Returns {label: number of items}; a task for which the text has none (words
    between single spaces are needed) is left out. A bundle made before is replaced, anything else is refused with a
    UserError.
    """
    folder = Path(folder).expanduser()
    _check_own(folder)
    mark = f"{MARK}: {num_items} items a task from a shard with SHA-256 {files.file_sha256(shard)}\n"
    draw = random.Random(OWN_SEED)
    texts = _first_texts(shard)
    pieces = _pieces(texts, draw, num_items)
    items = {
        "last_word": _last_words(texts, draw, num_items),
        "next_piece": _next_pieces(pieces, draw),
        "which_context": _which_contexts(pieces, draw),
        "copy": _copies(texts, draw, num_items),
        "brackets": _brackets(draw, num_items),
    }
    used = [task for task in OWN_TASKS if items[task[0]]]
    entries = [
        {"label": label, "dataset_uri": f"own/{label}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
        for label, kind, shots, _ in used
    ]
    with files.new_folder(folder, _check_own) as temporary:
        (temporary / "eval_data" / "own").mkdir(parents=True)
        for label, *_ in used:
            lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items[label])
            (temporary / "eval_data" / "own" / f"{label}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
        table = "".join(f"{label},{baseline:g}\n" for label, *_, baseline in used)
        (temporary / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + table, encoding="utf-8")
        listed = yaml.safe_dump({"icl_tasks": entries}, sort_keys=False)
        (temporary / "core.yaml").write_text(mark + listed, encoding="utf-8")
    return {label: len(items[label]) for label, *_ in used}


def _check_own(folder):
    """Raise UserError if `folder` is a file, or holds anything that `make` did not make."""
    described, tasks = folder / "core.yaml", [f"eval_data/own/{label}.jsonl" for label, *_ in OWN_TASKS]
    made = {"core.yaml", "eval_meta_data.csv", "eval_data", "eval_data/own", *tasks}
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    own = described.is_file() and described.read_bytes().startswith(MARK.encode())
    if folder.is_file() or not held <= (made if own else set()):
        raise UserError(f"--make-bundle={folder}: there is something else; choose a folder that does not exist")


def _first_texts(shard):
    texts = []
    for group in dataset.row_groups([shard]):
        texts += group
        if len(texts) >= MAX_DOCUMENTS:
            break
    return texts[:MAX_DOCUMENTS]


@dataclass(frozen=True)
class _Piece:
    """Words of document number `document`, of which `context`, one space and `continuation` are consecutive text."""

    document: int
    context: str
    continuation: str


def _piece(texts, draw, continuation_words):
    """A piece at a drawn place of a drawn document, or None if nothing fits there."""
    document = draw.randrange(len(texts))
    place = draw.randrange(len(texts[document]))
    begin = max(place - CONTEXT_CHARS, 0)
    text = texts[document][begin : place + CONTINUATION_CHARS]
    words = list(re.finditer(r"\S+", text))[1:-1]  # the outer ones may be cut
    middle = sum(word.start() < place - begin for word in words)
    if middle < continuation_words or middle + continuation_words > len(words):
        return None
    first, last = words[max(middle - CONTEXT_WORDS, 0)], words[middle - 1]
    if text[last.end() : words[middle].start()] != " ":
        return None
    continuation = text[words[middle].start() : words[middle + continuation_words - 1].end()]
    return _Piece(document, text[first.start() : last.end()], continuation)


def _distinct(drawn, num_items):
    """Up to `num_items` of what drawn() gives, None and repetitions left out."""
    found = {}
    for _ in range(TRIES * num_items):
        if len(found) == num_items:
            break
        item = drawn()
        if item is not None:
            found[item] = None
    return list(found)


def _pieces(texts, draw, num_items):
    return _distinct(lambda: _piece(texts, draw, CONTINUATION_WORDS), num_items) if texts else []


def _last_words(texts, draw, num_items):
    """The next word of a text, where it is one that the text before has: what a reader would guess."""

    def drawn():
        piece = _piece(texts, draw, 1)
        good = piece and len(piece.continuation) > 3 and piece.continuation.isalpha()
        return piece if good and piece.continuation in re.findall(r"\w+", piece.context) else None

    found = _distinct(drawn, num_items) if texts else []
    return [{"context": piece.context, "continuation": piece.continuation} for piece in found]


def _others(pieces, piece, draw, count):
    """`count` pieces of other documents, all with different continuations; None where there are too few."""
    kept = {other.continuation: other for other in pieces if other.document != piece.document}
    kept.pop(piece.continuation, None)
    return draw.sample(list(kept.values()), count) if len(kept) >= count else None


def _next_pieces(pieces, draw):
    """Which of four continuations is the true one? The others are from other documents."""
    items = []
    for piece in pieces:
        others = _others(pieces, piece, draw, NUM_CHOICES - 1)
        if others:
            choices = [other.continuation for other in (piece, *others)]
            draw.shuffle(choices)
            items.append({"query": piece.context, "choices": choices, "gold": choices.index(piece.continuation)})
    return items


def _which_contexts(pieces, draw):
    """Which of two contexts goes on like this? The other is from another document."""
    items = []
    for piece in pieces:
        others = _others(pieces, piece, draw, 1)
        if others and others[0].context != piece.context:
            options = [piece.context, others[0].context]
            draw.shuffle(options)
            gold = options.index(piece.context)
            items.append({"context_options": options, "continuation": piece.continuation, "gold": gold})
    return items


def _copies(texts, draw, num_items):
    """A few words to say again."""
    words = sorted({word for text in texts[:200] for word in re.findall(r"[^\W\d_]{3,8}", text)})

    def drawn():
        return " ".join(draw.sample(words, draw.randint(*COPIED_WORDS)))

    found = _distinct(drawn, num_items) if len(words) >= COPIED_WORDS[1] else []
    return [{"context": f"Copy: {text}\nCopy:", "continuation": text} for text in found]


def _brackets(draw, num_items):
    """Brackets to close in turn."""
    found = _distinct(lambda: tuple(draw.choices(range(4), k=draw.randint(*OPEN_BRACKETS))), num_items)
    return [
        {
            "context": "Open: " + " ".join(OPENING[kind] for kind in kinds) + "\nClose:",
            "continuation": " ".join(CLOSING[kind] for kind in reversed(kinds)),
        }
        for kinds in found
    ]

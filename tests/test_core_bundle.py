"""Bundles: read from a folder or a zip, fetched from a loopback host, made of a shard, and what is wrong with one."""

import functools
import hashlib
import http.server
import json
import random
import re
import threading
import zipfile

import pytest
import urllib3
from conftest import ALONE, make_shards, make_texts

from nanotrain import core_bundle, core_eval, dataset
from nanotrain.core_bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA
from nanotrain.errors import DataError, UserError

YAML = """
icl_tasks:
- {label: animals, dataset_uri: world/animals.jsonl, num_fewshot: [10], icl_task_type: multiple_choice,
   continuation_delimiter: "\\nAnswer: "}
- {label: who, dataset_uri: who.jsonl, num_fewshot: [0], icl_task_type: schema}
- {label: next, dataset_uri: next.jsonl, num_fewshot: [1], icl_task_type: language_modeling}
"""
CSV = "Eval Task,Category,Random baseline,Random baseline v2\nanimals,x,20,40.3\nnext,x,0,0\nwho,x,50,50\nother,x,9,9\n"
ANIMALS = [{"query": f"q{number}", "choices": ["a", "é\n"], "gold": number % 2} for number in range(7)]
WHO = {"context_options": ["x", "y"], "continuation": "z", "gold": 1, "category": "other fields are ignored"}
NEXT = [{"context": "1 2 \n", "continuation": "3"}, {"context": "2 3", "continuation": "4"}]


def lines(*items):
    return "".join(json.dumps(item) + "\n" for item in items)


FILES = {
    "core.yaml": YAML,
    "eval_meta_data.csv": CSV,
    "eval_data/world/animals.jsonl": lines(*ANIMALS),
    "eval_data/who.jsonl": lines(WHO) + "\n",
    "eval_data/next.jsonl": lines(*NEXT),
}


def write_bundle(folder, changed=None):
    for name, text in {**FILES, **(changed or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in FILES:
            file.write(folder / name, prefix + name)
    return path


# ---- reading ----


def test_tasks_are_what_the_files_say(tmp_path):
    animals, who, following = core_bundle.read(write_bundle(tmp_path)).tasks
    assert (animals.label, animals.kind, animals.num_shots) == ("animals", MULTIPLE_CHOICE, 10)
    assert (animals.delimiter, animals.baseline) == ("\nAnswer: ", 0.20)  # of DCLM v1, not the 40.3 of v2
    shuffled = [([(f"q{number}", "a"), (f"q{number}", "é\n")], number % 2) for number in range(7)]
    random.Random(1337).shuffle(shuffled)
    assert animals.items == shuffled
    assert (who.kind, who.num_shots, who.delimiter, who.baseline) == (SCHEMA, 0, " ", 0.5)
    assert who.items == [([("x", "z"), ("y", "z")], 1)]
    assert (following.kind, following.num_shots, following.baseline) == (LANGUAGE_MODELING, 1, 0.0)
    assert sorted(following.items) == [([("1 2", "3")], 0), ([("2 3", "4")], 0)]
    assert core_bundle.read(tmp_path, 3).tasks[0].items == shuffled[:3]


def test_folder_and_zip_are_the_same(tmp_path):
    folder = write_bundle(tmp_path / "b")
    expected = core_bundle.read(folder)
    assert core_bundle.read(zipped(folder, tmp_path / "flat.zip")) == expected
    assert core_bundle.read(zipped(folder, tmp_path / "public.zip", "eval_bundle/")) == expected


@pytest.mark.parametrize("name", FILES)
def test_the_hash_covers_every_file(tmp_path, name):
    first = core_bundle.read(write_bundle(tmp_path / "b"))
    other = core_bundle.read(write_bundle(tmp_path / "c", {name: FILES[name] + "\n\n"}))  # means the same
    assert other.sha256 != first.sha256
    assert other.tasks == first.tasks


BROKEN = [
    ("core.yaml", "tasks: []", "core.yaml .*icl_tasks"),
    ("core.yaml", "icl_tasks: []", "no items"),
    ("core.yaml", "icl_tasks: !!python/object/apply:os.system [true]", "ConstructorError"),
    ("core.yaml", YAML.replace("schema", "essay"), "core.yaml.*essay"),
    ("core.yaml", YAML.replace("[10]", "[0, 10]"), "core.yaml.*animals"),
    ("core.yaml", YAML.replace("who.jsonl", "../core.yaml"), "core.yaml.*not a task"),
    ("core.yaml", YAML.replace("who.jsonl", "/etc/passwd"), "core.yaml.*not a task"),
    ("core.yaml", YAML.replace("who.jsonl", "missing.jsonl"), "eval_data/missing.jsonl"),
    ("eval_meta_data.csv", CSV.replace("Random baseline,", "Guessing,"), "eval_meta_data.csv .*Random baseline"),
    ("eval_meta_data.csv", CSV.replace("who,x,50", "who,x,100"), "not a task"),
    ("eval_meta_data.csv", CSV.replace("who,", "whom,"), "who"),
    ("eval_data/who.jsonl", "", "no items"),
    ("eval_data/who.jsonl", "{\n", "who.jsonl, line 1"),
    ("eval_data/who.jsonl", lines(WHO, 7), "who.jsonl, line 2 .*schema"),
    ("eval_data/who.jsonl", lines({**WHO, "gold": 2}), "who.jsonl, line 1 .*schema"),
    ("eval_data/world/animals.jsonl", lines({**ANIMALS[0], "choices": ["a", 1]}), "line 1 .*multiple_choice"),
    ("eval_data/next.jsonl", lines({"context": "a", "continuation": ""}), "line 1 .*language_modeling"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_wrong_with_a_bundle_is_said(tmp_path, name, text, message):
    folder = write_bundle(tmp_path / "b", {name: text})
    for path in (folder, zipped(folder, tmp_path / "b.zip")):
        with pytest.raises(DataError, match=message):
            core_bundle.read(path)


def test_a_damaged_zip_is_refused_or_harmless(tmp_path):
    path = zipped(write_bundle(tmp_path / "b"), tmp_path / "b.zip")
    data, expected, num_refused = path.read_bytes(), core_bundle.read(path), 0
    for place in range(0, len(data), 13):
        path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        try:
            assert core_bundle.read(path) == expected  # what was damaged is a time or a permission
        except DataError:
            num_refused += 1
    assert num_refused > len(data) / 13 / 2


# ---- fetching ----


@pytest.fixture
def public(tmp_path, monkeypatch):
    """The file that a loopback host offers as the public bundle."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        monkeypatch.setattr(core_bundle.download, "RETRY", urllib3.Retry(4))  # without pauses
        monkeypatch.setattr(core_bundle, "URL", f"http://127.0.0.1:{host.server_port}/eval_bundle.zip")
        yield zipped(write_bundle(tmp_path / "b"), served / "eval_bundle.zip", "eval_bundle/")
        host.shutdown()


def test_the_public_bundle_is_fetched_once(public, tmp_path, base_dir):
    for _ in range(2):
        assert core_bundle.obtain("", None, ALONE, 2) == core_bundle.read(tmp_path / "b", 2)
        assert [path.name for path in (base_dir / "core").iterdir()] == ["eval_bundle.zip"]
        public.unlink(missing_ok=True)


def test_what_is_no_bundle_does_not_stay_and_one_line_says_why_there_is_no_core(public, base_dir, capsys):
    public.write_bytes(b"<html>please log in</html>")
    assert core_bundle.obtain("", None, ALONE, 5) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("CORE is skipped")
    assert list((base_dir / "core").iterdir()) == []


def test_a_bundle_that_was_asked_for_must_be_there(tmp_path):
    with pytest.raises(DataError, match=r"no CORE bundle at .*nowhere: .*--make-bundle="):
        core_bundle.obtain(str(tmp_path / "nowhere"), None, ALONE, 5)


# ---- one's own ----


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(shard, folder of the bundle made of it)"""
    folder = tmp_path_factory.mktemp("own")
    shard = make_shards(folder / "data", documents=60) / "shard_00002.parquet"
    core_bundle.make(folder / "bundle", shard, 50)
    return shard, folder / "bundle"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_is_made_in_the_public_format_with_all_kinds_of_tasks(own):
    bundle = core_bundle.read(own[1])
    assert [(task.label, task.kind, task.num_shots, task.baseline, len(task.items)) for task in bundle.tasks] == [
        ("last_word", LANGUAGE_MODELING, 0, 0.0, 50),
        ("next_piece", MULTIPLE_CHOICE, 0, 0.25, 50),
        ("which_context", SCHEMA, 0, 0.5, 50),
        ("copy", LANGUAGE_MODELING, 3, 0.0, 50),
        ("brackets", LANGUAGE_MODELING, 3, 0.0, 50),
    ]


def test_every_answer_is_right_and_no_other_one_is(own):
    texts = make_texts(60, seed=2)
    tasks = {task.label: task.items for task in core_bundle.read(own[1]).tasks}

    def is_text(*parts):
        return any(" ".join(parts) in text for text in texts)

    for ((context, answer),), _ in tasks["last_word"]:
        assert is_text(context, answer)
        assert answer in context.split()
    for label, num_options in (("next_piece", 4), ("which_context", 2)):
        for options, gold in tasks[label]:
            assert [is_text(*option) for option in options] == [number == gold for number in range(num_options)]
        counts = [sum(gold == place for _, gold in tasks[label]) for place in range(num_options)]
        assert min(counts) > 0.5 * 50 / num_options, "no place is right more often than the others"
    for ((context, answer),), _ in tasks["copy"]:
        assert context == f"Copy: {answer}\nCopy:"
        assert 2 <= len(answer.split()) <= 4
    for ((context, answer),), _ in tasks["brackets"]:
        text = re.sub(r"Open:|Close:|\s", "", context + answer)
        while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)) != text:
            text = shorter
        assert text == ""
    for label, items in tasks.items():
        assert len(set(map(str, items))) == len(items), label


def test_the_same_shard_gives_the_same_bytes_and_another_another(own, tmp_path):
    shard, folder = own
    made = contents(folder)
    core_bundle.make(tmp_path / "again", shard, 50)
    assert contents(tmp_path / "again") == made
    data = b"".join(made[name] for name in sorted(made) if name.startswith("eval_data"))
    assert hashlib.sha256(data).hexdigest() == "6d8f211f66aa52dc1781cdd12e931da7c2a832b2c5d2b18bc9bd6f31494cfeb3"
    core_bundle.make(tmp_path / "again", shard.with_name("shard_00001.parquet"), 50)  # in its place
    other = contents(tmp_path / "again")
    assert other.keys() == made.keys()
    assert other["core.yaml"] != made["core.yaml"]
    assert other["eval_data/own/copy.jsonl"] != made["eval_data/own/copy.jsonl"]


def test_other_folders_are_not_replaced(own, tmp_path):
    write_bundle(tmp_path / "public")
    before = contents(tmp_path / "public")
    with pytest.raises(UserError, match="would be lost"):
        core_bundle.make(tmp_path / "public", own[0], 50)
    assert contents(tmp_path / "public") == before


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["日本語の文章です。" * 50] * 3, {"brackets"}),
        (["a"], {"brackets"}),
        ([" ".join(make_texts(30))], {"last_word", "copy", "brackets"}),  # a single document
    ],
)
def test_tasks_for_which_the_text_has_nothing_are_left_out(tmp_path, texts, labels):
    dataset.write_shard(tmp_path / "shard_00000.parquet", texts)
    counts = core_bundle.make(tmp_path / "bundle", tmp_path / "shard_00000.parquet", 20)
    assert counts == dict.fromkeys(labels, 20)
    assert {task.label for task in core_bundle.read(tmp_path / "bundle").tasks} == labels


def test_a_command_without_a_task_says_what_it_can_do():
    with pytest.raises(UserError, match="--make-bundle=DIR"):
        core_eval.main()


def test_own_tasks_are_those_of_the_validation_shard_whatever_the_data_set_is_called(tmp_path, monkeypatch):
    for number in range(2):
        folder = make_shards(tmp_path / str(number) / "mine", train=1 + number)
        monkeypatch.setattr(core_eval, "DATA_DIR", str(folder))
        monkeypatch.setattr(core_eval, "MAKE_BUNDLE", "own")
        core_eval.main()
        shard = dataset.open_shards(folder).validation.path
        core_bundle.make(tmp_path / "expected", shard, core_eval.ITEMS_PER_TASK)
        found = core_bundle.obtain("own", shard, ALONE, 0)
        assert found == core_bundle.read(tmp_path / "expected")

"""Bundles: read from a folder or a zip, fetched from a loopback host, made of a shard, and what is wrong with one."""

import contextlib
import hashlib
import json
import random
import re
import zipfile

import pytest
import urllib3
from conftest import ALONE, make_shards, make_texts
from test_download import Host, contents, reply

from nanotrain import core_bundle, dataset, download
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


def test_folder_and_zip_are_the_same_and_the_hash_covers_every_file(tmp_path):
    folder = write_bundle(tmp_path / "b")
    expected = core_bundle.read(folder)
    assert core_bundle.read(zipped(folder, tmp_path / "flat.zip")) == expected
    assert core_bundle.read(zipped(folder, tmp_path / "public.zip", "eval_bundle/")) == expected
    for name, text in FILES.items():
        other = core_bundle.read(write_bundle(tmp_path / "c", {name: text + "\n\n"}))  # means the same
        assert (other.tasks, other.sha256 != expected.sha256) == (expected.tasks, True)


BROKEN = [
    ("core.yaml", "tasks: []", "core.yaml .*icl_tasks"),
    ("core.yaml", "icl_tasks: []", "no tasks"),
    ("core.yaml", "icl_tasks: !!python/object/apply:os.system [true]", "ConstructorError"),
    ("core.yaml", YAML.replace("schema", "essay"), "core.yaml.*essay"),
    ("core.yaml", YAML.replace("[10]", "[-1]"), "core.yaml.*animals"),
    ("eval_meta_data.csv", CSV.replace("who,", "whom,"), "who"),
    ("eval_data/who.jsonl", "", "who.jsonl.*no items"),
    ("eval_data/who.jsonl", lines(WHO) + "{", "who.jsonl, line 2"),
    ("eval_data/who.jsonl", lines({**WHO, "gold": 2}), "who.jsonl, line 1 .*schema"),
    ("eval_data/world/animals.jsonl", lines({**ANIMALS[0], "choices": ["a", 1]}), "line 1 .*multiple_choice"),
    ("eval_data/next.jsonl", lines({"context": "a", "continuation": ""}), "line 1 .*language_modeling"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_wrong_with_a_bundle_is_said(tmp_path, name, text, message):
    folder = write_bundle(tmp_path / "b", {name: text})
    with pytest.raises(DataError, match=message):
        core_bundle.read(folder)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The host of the public bundle."""
    body = zipped(write_bundle(tmp_path / "b"), tmp_path / "b.zip", "eval_bundle/").read_bytes()
    with contextlib.closing(Host()) as host:
        monkeypatch.setattr(download, "RETRY", urllib3.Retry(4))  # without pauses
        monkeypatch.setattr(core_bundle, "URL", f"{host.url}/eval_bundle.zip")
        host.script["eval_bundle.zip"] = [reply(body)]
        yield host


def test_the_public_bundle_is_fetched_once(host, tmp_path):
    for _ in range(2):
        assert core_bundle.obtain("", None, ALONE, 2) == core_bundle.read(tmp_path / "b", 2)
    assert host.asked() == ["eval_bundle.zip"]


def test_what_is_no_bundle_does_not_stay_and_one_line_says_why_there_is_no_core(host, base_dir, capsys):
    host.script["eval_bundle.zip"] = [reply(b"<html>please log in</html>")]
    assert core_bundle.obtain("", None, ALONE, 5) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("CORE skipped")
    assert list((base_dir / "core").iterdir()) == []


def test_a_bundle_that_was_asked_for_must_be_there(tmp_path):
    with pytest.raises(DataError, match=r"no CORE bundle at .*nowhere: .*--make-bundle="):
        core_bundle.obtain(str(tmp_path / "nowhere"), None, ALONE, 5)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(shard, folder of the bundle made of it)"""
    folder = tmp_path_factory.mktemp("own")
    shard = make_shards(folder / "data", documents=60) / "shard_00002.parquet"
    core_bundle.make(folder / "bundle", shard, 50)
    return shard, folder / "bundle"


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
        assert len(set(map(str, items))) == len(items) == 50, label


def test_the_same_shard_gives_the_same_bytes_and_another_another(own, tmp_path):
    shard, folder = own
    data = contents(folder / "eval_data" / "own")
    digest = hashlib.sha256(b"".join(data.values())).hexdigest()
    assert digest == "6d8f211f66aa52dc1781cdd12e931da7c2a832b2c5d2b18bc9bd6f31494cfeb3"
    for number in (1, 2):  # in the place of the one before
        core_bundle.make(tmp_path / "again", shard.with_name(f"shard_0000{number}.parquet"), 50)
        assert (contents(tmp_path / "again" / "eval_data" / "own") == data) == (number == 2)
    assert (tmp_path / "again" / "core.yaml").read_bytes() == (folder / "core.yaml").read_bytes()


def test_other_folders_are_not_replaced(own, tmp_path):
    folder = write_bundle(tmp_path / "public")
    with pytest.raises(UserError, match="would be lost"):
        core_bundle.make(folder, own[0], 50)
    assert core_bundle.read(folder).tasks


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["日本語の文章です。" * 50] * 3, {"brackets"}),
        ([""], {"brackets"}),
        ([" ".join(make_texts(30))], {"last_word", "copy", "brackets"}),  # a single document
    ],
)
def test_tasks_for_which_the_text_has_nothing_are_left_out(tmp_path, texts, labels):
    dataset.write_shard(tmp_path / "shard_00000.parquet", texts)
    counts = core_bundle.make(tmp_path / "bundle", tmp_path / "shard_00000.parquet", 20)
    assert counts == dict.fromkeys(labels, 20)
    assert {task.label for task in core_bundle.read(tmp_path / "bundle").tasks} == labels


def test_own_tasks_are_those_of_the_validation_shard_whatever_the_data_set_is_called(tmp_path, monkeypatch):
    for number in range(2):
        folder = make_shards(tmp_path / str(number) / "mine", train=1 + number)
        shard = dataset.open_shards(folder).validation.path
        core_bundle.make(tmp_path / "expected", shard, core_bundle.OWN_ITEMS)
        found = core_bundle.obtain("own", shard, ALONE, 0)
        assert found == core_bundle.read(tmp_path / "expected")

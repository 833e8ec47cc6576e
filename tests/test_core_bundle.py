"""Bundles: read from a folder or a zip, fetched from a loopback host, made of a shard, and what is wrong with one."""

import hashlib
import json
import os
import random
import re
import shutil
import socket
import zipfile

import pytest
from conftest import ALONE, make_shards, make_texts
from test_download import Host, reply

from nanotrain import core_bundle, core_eval, dataset
from nanotrain.core_bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA
from nanotrain.errors import DataError, UserError

YAML = """
icl_tasks:
-
  label: animals
  dataset_uri: world/animals.jsonl
  num_fewshot: [10]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
-
  label: who
  dataset_uri: who.jsonl
  num_fewshot: [0]
  icl_task_type: schema
-
  label: next
  dataset_uri: next.jsonl
  num_fewshot: [1]
  icl_task_type: language_modeling
"""
CSV = """Eval Task,Task Category,Random baseline,Random baseline v2
animals,x,20,40.3
next,x,0,0
who,x,50,50
other,x,9,9
"""
ANIMALS = [{"query": f"q{number}", "choices": ["a", "é\n"], "gold": number % 2} for number in range(7)]
WHO = [{"context_options": ["x", "y"], "continuation": "z", "gold": 1, "category": "other fields are ignored"}]
NEXT = [{"context": "1 2", "continuation": "3"}, {"context": "2 3", "continuation": "4"}]


def lines(items):
    return "".join(json.dumps(item) + "\n" for item in items)


def write_bundle(folder, **changed):
    """The files of a bundle; `changed` has texts of core_yaml, csv, animals, who or next."""
    files = {"core_yaml": YAML, "csv": CSV, "animals": lines(ANIMALS), "who": lines(WHO) + "\n", "next": lines(NEXT)}
    files |= changed
    (folder / "eval_data" / "world").mkdir(parents=True)
    (folder / "core.yaml").write_text(files["core_yaml"], encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text(files["csv"], encoding="utf-8")
    for name, path in (("animals", "world/animals.jsonl"), ("who", "who.jsonl"), ("next", "next.jsonl")):
        (folder / "eval_data" / path).write_text(files[name], encoding="utf-8")
    return folder


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for found in sorted(folder.rglob("*")):
            if found.is_file():
                file.write(found, prefix + str(found.relative_to(folder)))
    return path


# ---- reading ----


def test_tasks_are_what_the_files_say(tmp_path):
    animals, who, following = core_bundle.read(write_bundle(tmp_path / "b")).tasks
    assert (animals.label, animals.kind, animals.num_shots) == ("animals", MULTIPLE_CHOICE, 10)
    assert (animals.delimiter, animals.baseline) == ("\nAnswer: ", 0.20)  # of DCLM v1, not the 40.3 of v2
    shuffled = list(ANIMALS)
    random.Random(1337).shuffle(shuffled)
    assert list(animals.items) == shuffled
    assert (who.kind, who.num_shots, who.delimiter, who.baseline, who.items) == (SCHEMA, 0, " ", 0.5, tuple(WHO))
    assert (following.kind, following.num_shots, following.baseline) == (LANGUAGE_MODELING, 1, 0.0)
    assert sorted(item["continuation"] for item in following.items) == ["3", "4"]


def test_folder_zip_and_zip_of_the_folder_are_the_same(tmp_path):
    folder = write_bundle(tmp_path / "b")
    expected = core_bundle.read(folder)
    assert core_bundle.read(zipped(folder, tmp_path / "flat.zip")) == expected
    assert core_bundle.read(zipped(folder, tmp_path / "public.zip", "eval_bundle/")) == expected
    shutil.copytree(folder, tmp_path / "above" / "eval_bundle")
    assert core_bundle.read(tmp_path / "above") == expected
    assert not expected.is_core


@pytest.mark.parametrize("name", ["core_yaml", "csv", "animals", "who", "next"])
def test_the_hash_covers_every_file(tmp_path, name):
    first = core_bundle.read(write_bundle(tmp_path / "b"))
    texts = {"core_yaml": YAML, "csv": CSV, "animals": lines(ANIMALS), "who": lines(WHO), "next": lines(NEXT)}
    other = core_bundle.read(write_bundle(tmp_path / "c", **{name: texts[name] + "\n\n"}))  # means the same
    assert other.sha256 != first.sha256
    assert other.tasks == first.tasks


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_the_first_items_of_the_shuffled_ones_are_taken(tmp_path, most):
    """Also fewer than the ten shots of the task, which then shows all others."""
    folder = write_bundle(tmp_path / "b")
    whole = core_bundle.read(folder).tasks[0].items
    task = core_bundle.read(folder, most).tasks[0]
    assert task.items == whole[:most]
    assert [len(core_eval.shots(task, index)) for index in range(len(task.items))] == [min(most, 7) - 1] * min(most, 7)


BROKEN = [
    ({"core_yaml": "icl_tasks: ["}, "core.yaml: not a list of tasks"),
    ({"core_yaml": "tasks: []"}, "core.yaml: not a list of tasks"),
    ({"core_yaml": "icl_tasks: []"}, "core.yaml: no task"),
    ({"core_yaml": YAML.replace("label: who", "label: next")}, "two of one name"),
    ({"core_yaml": YAML.replace("schema", "essay")}, "icl_task_type 'essay' of who"),
    ({"core_yaml": YAML.replace("[10]", "[0, 10]")}, "core.yaml: not a list of tasks"),
    ({"core_yaml": YAML.replace("[10]", "[-1]")}, "num_fewshot .* of animals"),
    ({"core_yaml": YAML.replace("who.jsonl", "../core.yaml")}, "dataset_uri or continuation_delimiter of who"),
    ({"core_yaml": YAML.replace("who.jsonl", "/etc/passwd")}, "dataset_uri or continuation_delimiter of who"),
    ({"core_yaml": YAML.replace("who.jsonl", "missing.jsonl")}, "eval_data/missing.jsonl cannot be read"),
    ({"core_yaml": "icl_tasks: !!python/object/apply:os.system [true]"}, "core.yaml: not a list of tasks"),
    ({"csv": CSV.replace("Random baseline,", "Guessing,")}, "eval_meta_data.csv: no random baselines"),
    ({"csv": CSV.replace("who,x,50", "who,x,100")}, r"not in \[0, 100\)"),
    ({"csv": CSV.replace("who,", "whom,")}, "no random baseline of who"),
    ({"who": ""}, "who.jsonl: no items"),
    ({"who": "{\n"}, "who.jsonl, line 1: no schema item"),
    ({"who": lines(WHO) + "7\n"}, "who.jsonl, line 2: no schema item"),
    ({"who": lines([{**WHO[0], "gold": 2}])}, "who.jsonl, line 1: no schema item"),
    ({"who": lines([{**WHO[0], "gold": True}])}, "who.jsonl, line 1: no schema item"),
    ({"who": lines([{**WHO[0], "gold": -1}])}, "who.jsonl, line 1: no schema item"),
    ({"who": lines([{**WHO[0], "context_options": ["x"], "gold": 0}])}, "who.jsonl, line 1: no schema item"),
    ({"animals": lines([{**ANIMALS[0], "choices": ["a", 1]}])}, "animals.jsonl, line 1: no multiple_choice item"),
    ({"animals": lines([{"choices": ["a", "b"], "gold": 1}])}, "animals.jsonl, line 1: no multiple_choice item"),
    ({"next": lines([{"context": "a", "continuation": ""}])}, "next.jsonl, line 1: no language_modeling item"),
    ({"next": lines([{"context": None, "continuation": "a"}])}, "next.jsonl, line 1: no language_modeling item"),
]


@pytest.mark.parametrize(("changed", "message"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_wrong_with_a_bundle_is_said(tmp_path, changed, message):
    folder = write_bundle(tmp_path / "b", **changed)
    for path in (folder, zipped(folder, tmp_path / "b.zip")):
        with pytest.raises(DataError, match=message):
            core_bundle.read(path)


def test_a_bundle_that_is_none_is_said(tmp_path):
    with pytest.raises(DataError, match=r"no CORE bundle at .*nowhere: .*--make-bundle="):
        core_bundle.read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="yaml cannot be read"):
        core_bundle.read(tmp_path)
    path = zipped(write_bundle(tmp_path / "b"), tmp_path / "b.zip")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="not a readable zip"):
        core_bundle.read(path)
    place = data.index(b"core.yaml") + len(b"core.yaml") + 40
    path.write_bytes(data[:place] + bytes(byte ^ 255 for byte in data[place : place + 9]) + data[place + 9 :])
    with pytest.raises(DataError, match="yaml cannot be read"):
        core_bundle.read(path)


# ---- fetching ----


@pytest.fixture
def host():
    host = Host()
    yield host
    host.close()


@pytest.fixture
def public(tmp_path):
    return zipped(write_bundle(tmp_path / "b"), tmp_path / "public.zip", "eval_bundle/").read_bytes()


def test_the_public_bundle_is_fetched_once_and_again_when_its_hash_is_another(host, public, tmp_path):
    host.script["/eval_bundle.zip"] = [reply(public)]
    folder = tmp_path / "core"
    path = core_bundle.fetch(folder, f"{host.url}/eval_bundle.zip")
    assert path.read_bytes() == public
    assert (folder / core_bundle.HASH_NAME).read_text() == hashlib.sha256(public).hexdigest() + "\n"
    assert core_bundle.fetch(folder, f"{host.url}/eval_bundle.zip") == path
    assert len(host.seen) == 1
    path.write_bytes(public[:-1] + b"x")
    assert core_bundle.fetch(folder, f"{host.url}/eval_bundle.zip").read_bytes() == public
    assert len(host.seen) == 2
    assert sorted(os.listdir(folder)) == [core_bundle.ZIP_NAME, core_bundle.HASH_NAME]


def test_a_public_bundle_that_was_put_there_by_hand_stays(host, public, tmp_path):
    host.script["/eval_bundle.zip"] = [reply(public)]
    (tmp_path / core_bundle.ZIP_NAME).write_bytes(b"mine")
    assert core_bundle.fetch(tmp_path, f"{host.url}/eval_bundle.zip").read_bytes() == b"mine"


def test_what_is_no_bundle_does_not_stay(host, tmp_path):
    host.script["/eval_bundle.zip"] = [reply(b"<html>please log in</html>")]
    with pytest.raises(DataError, match="not a readable zip"):
        core_bundle.fetch(tmp_path / "core", f"{host.url}/eval_bundle.zip")
    assert os.listdir(tmp_path / "core") == []


def test_without_its_host_there_is_no_core_and_one_line_says_so(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url, fetch, said = f"http://127.0.0.1:{port}/eval_bundle.zip", core_bundle.fetch, []
    monkeypatch.setattr(core_bundle, "fetch", lambda folder: fetch(folder, url))
    assert core_bundle.obtain("", tmp_path / "core", None, ALONE, 5, said.append) is None
    (line,) = said
    assert line.startswith("CORE is skipped")
    assert "cannot be reached" in line
    assert "\n" not in line


def test_a_bundle_that_was_asked_for_must_be_there(tmp_path):
    said = []
    with pytest.raises(DataError, match="no CORE bundle"):
        core_bundle.obtain(str(tmp_path / "nowhere"), tmp_path, None, ALONE, 5, said.append)
    found = core_bundle.obtain(str(write_bundle(tmp_path / "b")), tmp_path, None, ALONE, 2, said.append)
    assert found == core_bundle.read(tmp_path / "b", 2)
    assert said == []


# ---- one's own ----


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(shard, folder of the bundle made of it)"""
    folder = tmp_path_factory.mktemp("own")
    shard = make_shards(folder / "data", documents=60) / "shard_00002.parquet"
    core_bundle.make(folder / "bundle", shard, 50)
    return shard, folder / "bundle"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_is_made_in_the_public_format_with_all_kinds_of_tasks(own):
    bundle = core_bundle.read(own[1])
    assert [(task.label, task.kind, task.baseline, len(task.items)) for task in bundle.tasks] == [
        ("last_word", LANGUAGE_MODELING, 0.0, 50),
        ("next_piece", MULTIPLE_CHOICE, 0.25, 50),
        ("which_context", SCHEMA, 0.5, 50),
        ("copy", LANGUAGE_MODELING, 0.0, 50),
        ("brackets", LANGUAGE_MODELING, 0.0, 50),
    ]
    assert not bundle.is_core


def test_every_answer_is_right_and_no_other_one_is(own):
    texts = make_texts(60, seed=2)
    tasks = {task.label: task.items for task in core_bundle.read(own[1]).tasks}

    def is_text(*parts):
        return any(" ".join(parts) in text for text in texts)

    for item in tasks["last_word"]:
        assert is_text(item["context"], item["continuation"])
        assert item["continuation"] in item["context"].split()
    for item in tasks["next_piece"]:
        assert len(set(item["choices"])) == 4
        assert [is_text(item["query"], choice) for choice in item["choices"]] == [n == item["gold"] for n in range(4)]
    for item in tasks["which_context"]:
        fits = [is_text(context, item["continuation"]) for context in item["context_options"]]
        assert fits == [number == item["gold"] for number in (0, 1)]
    for item in tasks["copy"]:
        assert item["context"] == f"Copy: {item['continuation']}\nCopy:"
        assert 2 <= len(item["continuation"].split()) <= 4
    for item in tasks["brackets"]:
        text = re.sub(r"Open:|Close:|\s", "", item["context"]) + item["continuation"].replace(" ", "")
        while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)) != text:
            text = shorter
        assert text == ""
    for label, items in tasks.items():
        assert len({json.dumps(item) for item in items}) == len(items), label
    for label, num_choices in (
        ("next_piece", 4),
        ("which_context", 2),
    ):  # guessing one place gives no more than guessing
        counts = [sum(item["gold"] == place for item in tasks[label]) for place in range(num_choices)]
        assert min(counts) > 0.5 * 50 / num_choices, (label, counts)


def test_the_same_shard_gives_the_same_bytes_and_another_another(own, tmp_path):
    shard, folder = own
    core_bundle.make(tmp_path / "again", shard, 50)
    assert contents(tmp_path / "again") == contents(folder)
    core_bundle.make(tmp_path / "again", shard.with_name("shard_00001.parquet"), 50)  # in its place
    other = contents(tmp_path / "again")
    assert other.keys() == contents(folder).keys()
    assert {name for name in other if other[name] != contents(folder)[name]} >= {
        "core.yaml",
        "eval_data/own/copy.jsonl",
    }


def test_a_folder_may_be_given_with_a_tilde(own, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    core_bundle.make("~/tasks", own[0], 5)
    assert core_bundle.read("~/tasks").sha256 == core_bundle.read(tmp_path / "tasks").sha256


def test_other_folders_are_not_replaced(own, tmp_path):
    write_bundle(tmp_path / "public")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    core_bundle.make(tmp_path / "ours", own[0], 5)
    (tmp_path / "ours" / "eval_data" / "mine.jsonl").write_text("dear")
    for name in ("public", "home", "ours"):
        before = contents(tmp_path / name)
        with pytest.raises(UserError, match="something else"):
            core_bundle.make(tmp_path / name, own[0], 50)
        assert contents(tmp_path / name) == before
    (tmp_path / "note").write_text("milk")
    with pytest.raises(UserError, match="choose a folder that does not exist"):
        core_bundle.make(tmp_path / "note", own[0], 50)
    assert (tmp_path / "note").read_text() == "milk"
    (tmp_path / "empty").mkdir()
    assert (
        core_bundle.make(tmp_path / "empty", own[0], 5).keys()
        == dict.fromkeys(["last_word", "next_piece", "which_context", "copy", "brackets"]).keys()
    )


@pytest.mark.parametrize("texts", [["日本語の文章です。" * 50] * 3, ["a"], ["one two"]], ids=["no spaces", "a", "two"])
def test_text_without_words_gives_the_tasks_that_need_none(tmp_path, texts):
    dataset.write_shard(tmp_path / "shard_00000.parquet", texts)
    assert core_bundle.make(tmp_path / "bundle", tmp_path / "shard_00000.parquet", 20) == {"brackets": 20}
    assert len(core_bundle.read(tmp_path / "bundle").tasks) == 1


def test_a_continuation_that_another_document_has_too_is_no_wrong_answer():
    pieces = [core_bundle._Piece(number, f"{number}", "same" if number < 3 else f"c{number}") for number in range(6)]
    for seed in range(5):
        others = core_bundle._others(pieces, pieces[0], random.Random(seed), 3)
        assert sorted(other.continuation for other in others) == ["c3", "c4", "c5"]
    assert core_bundle._others(pieces, pieces[0], random.Random(0), 4) is None


def test_one_document_gives_no_choices_from_others(tmp_path):
    dataset.write_shard(tmp_path / "shard_00000.parquet", [" ".join(make_texts(30))])
    counts = core_bundle.make(tmp_path / "bundle", tmp_path / "shard_00000.parquet", 20)
    assert counts == {"last_word": 20, "copy": 20, "brackets": 20}


def test_the_command_makes_a_bundle(run_script, base_dir, tmp_path, own):
    folder, data = tmp_path / "tasks", own[0].parent
    done = run_script(
        "nanotrain.core_eval",
        f"--make-bundle={folder}",
        f"--data-dir={data}",
        "--items-per-task=7",
        OMP_NUM_THREADS="1",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{folder}, of {own[0].name}:\n7 last_word, 7 next_piece, ")
    core_bundle.make(tmp_path / "expected", own[0], 7)
    assert contents(folder) == contents(tmp_path / "expected")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "--make-bundle=DIR"), ({"MAKE_BUNDLE": "x", "ITEMS_PER_TASK": 0}, "--items-per-task=0: at least 1")],
)
def test_a_command_without_a_task_says_what_it_can_do(monkeypatch, settings, message):
    for name, value in settings.items():
        monkeypatch.setattr(core_eval, name, value)
    with pytest.raises(UserError, match=message):
        core_eval.main()


def test_own_tasks_are_those_of_the_validation_shard_whatever_the_data_set_is_called(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOTRAIN_DIR", str(tmp_path))
    bundles = []
    for number in range(2):
        folder = make_shards(tmp_path / str(number) / "mine", train=1 + number)
        monkeypatch.setattr(core_eval, "DATA_DIR", str(folder))
        monkeypatch.setattr(core_eval, "MAKE_BUNDLE", "own")
        core_eval.main()
        shard = dataset.open_shards(folder).validation.path
        bundles.append(core_bundle.obtain("own", tmp_path / "core", shard, ALONE, 0, print))
        assert bundles[-1].sha256 == core_bundle.read(core_bundle.own_folder(tmp_path / "core", shard)).sha256
    assert bundles[0].sha256 != bundles[1].sha256

"""CORE against prompts and scores written out by hand, and against one item at a time through all logits."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE, make_model, on_every_rank

from nanotrain import core_bundle, core_eval
from nanotrain.core_bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA, Bundle, Task, parse_item
from nanotrain.gpt import GPTConfig

ALPHABET = " abcdefghijklmnopqrstuvwxyz?:.\nAQ"


class Letters:
    """A tokenizer whose tokens are the characters of ALPHABET, after BOS, which is token 0."""

    bos, vocab_size = 0, 1 + len(ALPHABET)

    def encode_batch(self, texts):
        return [[1 + ALPHABET.index(character) for character in text] for text in texts]


LETTERS = Letters()


def encoded(task, index):
    return [[0, *ids] for ids in LETTERS.encode_batch(core_eval.prompts(task, index))]


def task_of(label, kind, num_shots, delimiter, baseline, *entries):
    return Task(label, kind, num_shots, delimiter, baseline, [parse_item(kind, entry) for entry in entries])


THREE = (
    task_of(
        "choices", MULTIPLE_CHOICE, 1, "\nA: ", 0.25,
        {"query": "Q: dogs?", "choices": ["bark", "meow", "moo"], "gold": 0},
        {"query": "Q: cats?", "choices": ["bark", "meow"], "gold": 1},
    ),
    task_of(
        "contexts", SCHEMA, 1, " ", 0.5,
        {"context_options": ["the dog barks since the dog", "the dog barks since the cat"],
         "continuation": "runs away.", "gold": 1},
        {"context_options": ["ice melts as it", "iron melts as it"], "continuation": "is warm.", "gold": 0},
    ),
    task_of(
        "cloze", LANGUAGE_MODELING, 1, " ", 0.0,
        {"context": "one two \n", "continuation": "three"}, {"context": "  a b", "continuation": "c d"},
    ),
)  # fmt: skip
BY_HAND = {
    "choices": [
        ["Q: cats?\nA: meow\n\nQ: dogs?\nA: bark", "Q: cats?\nA: meow\n\nQ: dogs?\nA: meow",
         "Q: cats?\nA: meow\n\nQ: dogs?\nA: moo"],
        ["Q: dogs?\nA: bark\n\nQ: cats?\nA: bark", "Q: dogs?\nA: bark\n\nQ: cats?\nA: meow"],
    ],
    "contexts": [
        ["ice melts as it is warm.\n\nthe dog barks since the dog runs away.",
         "ice melts as it is warm.\n\nthe dog barks since the cat runs away."],
        ["the dog barks since the cat runs away.\n\nice melts as it is warm.",
         "the dog barks since the cat runs away.\n\niron melts as it is warm."],
    ],
    "cloze": [
        ["a b c d\n\none two", "a b c d\n\none two three"],
        ["one two three\n\na b", "one two three\n\na b c d"],
    ],
}  # fmt: skip


@pytest.mark.parametrize("task", THREE, ids=lambda task: task.label)
def test_prompts_are_those_written_by_hand(task):
    assert [core_eval.prompts(task, index) for index in (0, 1)] == BY_HAND[task.label]
    without_shots = [[text.partition("\n\n")[2] for text in texts] for texts in BY_HAND[task.label]]
    assert [core_eval.prompts(replace(task, num_shots=0), index) for index in (0, 1)] == without_shots


@pytest.mark.parametrize("num_items", [4, 40])
def test_shots_are_drawn_from_the_others_by_the_published_seed(num_items):
    """All others where they are too few."""
    items = [([(f"q{number}", "a"), ("", "b")], 0) for number in range(num_items)]
    for index in range(num_items):
        others = [f"q{number} a" for number in range(num_items) if number != index]
        expected = random.Random(1234 + index).sample(others, min(10, num_items - 1))
        text = core_eval.prompts(Task("x", MULTIPLE_CHOICE, 10, " ", 0.5, items), index)[0]
        assert text.split("\n\n") == [*expected, f"q{index} a"]


@pytest.mark.parametrize(
    ("kind", "encoded", "max_len", "expected"),
    [
        (MULTIPLE_CHOICE, [[0, 1, 2, 3], [0, 1, 4]], 9, [([0, 1, 2, 3], 2), ([0, 1, 4], 2)]),
        (MULTIPLE_CHOICE, [[0, 1, 2], [0, 1, 2, 3]], 9, [([0, 1, 2], 2), ([0, 1, 2, 3], 2)]),  # one begins the other
        (MULTIPLE_CHOICE, [[0, 1, 2, 3, 4], [0, 1, 2, 5]], 3, [([2, 3, 4], 1), ([1, 2, 5], 2)]),  # cut on the left
        (MULTIPLE_CHOICE, [[0, 1, 2, 3, 4], [0, 5]], 3, [([2, 3, 4], 1), ([0, 5], 1)]),  # an answer too long
        (SCHEMA, [[0, 1, 2, 7, 8], [0, 3, 7, 8]], 9, [([0, 1, 2, 7, 8], 3), ([0, 3, 7, 8], 2)]),
        (SCHEMA, [[0, 1, 2, 7, 8], [0, 3, 7, 8]], 4, [([1, 2, 7, 8], 2), ([0, 3, 7, 8], 2)]),
        (SCHEMA, [[0, 7], [0, 8]], 9, [([0, 7], 1), ([0, 8], 1)]),  # no token in common at the end
        (LANGUAGE_MODELING, [[0, 1], [0, 1, 2, 3]], 9, [([0, 1, 2, 3], 2)]),
        (LANGUAGE_MODELING, [[0, 1, 9], [0, 1, 2, 3]], 9, [([0, 1, 2, 3], 2)]),  # tokens meet across the border
        (LANGUAGE_MODELING, [[0, 1], [0, 1, 2, 3]], 3, [([1, 2, 3], 1)]),
        (LANGUAGE_MODELING, [[0, 1], [0, 1, 2, 3]], 1, [([2, 3], 1)]),
    ],
)  # fmt: skip
def test_scored_tokens_are_those_counted_by_hand(kind, encoded, max_len, expected):
    assert core_eval.sequences(kind, encoded, max_len) == expected


def test_choices_that_differ_by_rounding_are_equal_and_the_first_counts():
    assert [core_eval._first_least([1.0 + more, 1.0]) for more in (0.0, 2e-6, 1e-4)] == [0, 0, 1]
    assert core_eval._first_least([math.nan, math.nan]) == 0  # a broken model has a score and no error


@pytest.fixture(scope="module")
def case():
    """A model of letters with a context of 24, and tasks of 13 items of which it solves some, in all kinds and lengths:
    every third continuation is what the model itself writes.
    """
    model, draw = make_model(GPTConfig(LETTERS.vocab_size, 24, 2, 2, 2, 8), 0.7), random.Random(7)

    def text(most):
        return "".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, most)))

    def written(context):
        ids = [0, *LETTERS.encode_batch([context])[0]]
        for _ in range(2):
            ids.append(int(model.logits(torch.tensor([ids[-24:]]))[0, -1, 1:].argmax()) + 1)
        return "".join(ALPHABET[token - 1] for token in ids[-2:])

    choices = [
        {"query": text(30), "choices": [text(5) for _ in range(4)], "gold": draw.randrange(4)} for _ in range(13)
    ]
    contexts = [
        {"context_options": [text(9), text(29)], "continuation": text(6), "gold": draw.randrange(2)} for _ in range(13)
    ]
    cloze = [{"context": text(18), "continuation": text(2)} for _ in range(13)]
    for item in cloze[::3]:
        item["continuation"] = written(item["context"])
    tasks = [
        task_of("choices", MULTIPLE_CHOICE, 0, " ", 0.25, *choices),
        task_of("choices after two", MULTIPLE_CHOICE, 2, " ", 0.25, *choices),
        task_of("contexts", SCHEMA, 1, " ", 0.5, *contexts),
        task_of("cloze", LANGUAGE_MODELING, 0, "", 0.0, *cloze),
    ]
    bundle = Bundle(tasks, "5a")
    return SimpleNamespace(model=model, bundle=bundle, alone=core_eval.evaluate(model, LETTERS, bundle, ALONE, 100))


def right_by_definition(model, task, index):
    """Whether the model solves an item: its prompts one at a time, whole logits in float64."""
    nats = []
    for ids, start in core_eval.sequences(task.kind, encoded(task, index), 24):
        logits = model.logits(torch.tensor([ids]))[0].double()[start - 1 : -1]
        if task.kind == LANGUAGE_MODELING:
            return logits.argmax(-1).tolist() == ids[start:]
        nats.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])).item())
    return nats.index(min(nats)) == task.items[index][1]


def test_a_real_model_gives_the_definition(case):
    tasks = case.bundle.tasks
    expected = [sum(right_by_definition(case.model, task, index) for index in range(13)) / 13 for task in tasks]
    assert all(0 < accuracy < 1 for accuracy in expected)
    assert [task["accuracy"] for task in case.alone["tasks"].values()] == expected


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 1), (20, 8)])
def test_neither_ranks_nor_batches_nor_blocks_of_items_change_anything(case, monkeypatch, world_size, batch_size):
    monkeypatch.setattr(core_eval, "BLOCK_ITEMS", 3)
    found = on_every_rank(
        world_size, lambda rank: core_eval.evaluate(case.model, LETTERS, case.bundle, rank, batch_size)
    )
    assert found == [case.alone] * world_size


def result_of(*scores):
    """The result for (label, num_items, num_right, baseline) of each task."""
    tasks = [Task(label, SCHEMA, 0, " ", baseline, [([], 0)] * count) for label, count, _, baseline in scores]
    return core_eval.summary(Bundle(tasks, "5a"), [right for _, _, right, _ in scores])


def test_the_result_by_hand():
    result = result_of(("a", 100, 50, 0.25), ("b", 400, 320, 0.62), ("c", 25, 0, 0.0))
    tasks = result["tasks"]
    assert [task["centered"] for task in tasks.values()] == pytest.approx([1 / 3, 0.18 / 0.38, 0.0])
    assert [task["standard_error"] for task in tasks.values()] == pytest.approx([0.05, 0.02, 0.0])
    assert result["core_metric"] == pytest.approx((1 / 3 + 0.18 / 0.38) / 3)
    assert result["standard_error"] == pytest.approx(math.sqrt((0.05 / 0.75) ** 2 + (0.02 / 0.38) ** 2) / 3)
    assert (result["accuracy"], result["baseline"]) == (pytest.approx(1.3 / 3), pytest.approx(0.87 / 3))
    assert (result["is_core"], result["bundle_sha256"], tasks["b"]["num_items"]) == (False, "5a", 400)
    assert core_eval.table(result).splitlines()[1].split() == ["a", "0.5000", "0.0500", "0.2500", "0.3333", "100"]
    assert core_eval.headline(result).startswith("tasks 0.2690 +- 0.0283 (3 tasks, not CORE")


def test_the_22_tasks_are_core_with_the_baselines_of_nanochats_scores():
    assert len(core_bundle.CORE_LABELS) == 22
    result = result_of(*[(label, 16, 1, 0.20) for label in core_bundle.CORE_LABELS])
    assert result["tasks"]["agi_eval_lsat_ar"]["centered"] == pytest.approx(-0.1719, abs=5e-5)  # as nanochat prints it
    assert core_eval.headline(result).startswith("CORE -0.1719 +- ")

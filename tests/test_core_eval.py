"""CORE against prompts and scores written out by hand, and against one item at a time through all logits."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE, make_model, on_every_rank

from nanotrain import core_bundle, core_eval, loss
from nanotrain.core_bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA, Bundle, Task
from nanotrain.core_eval import Score
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


# ---- prompts, by hand ----

CHOICES = Task(
    "choices", MULTIPLE_CHOICE, 1, "\nA: ", 0.25,
    ({"query": "Q: dogs?", "choices": ["bark", "meow", "moo"], "gold": 0},
     {"query": "Q: cats?", "choices": ["bark", "meow"], "gold": 1}),
)  # fmt: skip
CONTEXTS = Task(
    "contexts", SCHEMA, 1, " ", 0.5,
    ({"context_options": ["the dog barks since the dog", "the dog barks since the cat"],
      "continuation": "runs away.", "gold": 1},
     {"context_options": ["ice melts as it", "iron melts as it"], "continuation": "is warm.", "gold": 0}),
)  # fmt: skip
CLOZE = Task(
    "cloze", LANGUAGE_MODELING, 1, " ", 0.0,
    ({"context": "one two \n", "continuation": "three"}, {"context": "  a b", "continuation": "c d"}),
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
THREE = (CHOICES, CONTEXTS, CLOZE)


@pytest.mark.parametrize("task", THREE, ids=lambda task: task.label)
def test_prompts_are_those_written_by_hand(task):
    assert [core_eval.prompts(task, index) for index in (0, 1)] == BY_HAND[task.label]
    without_shots = [[text.partition("\n\n")[2] for text in texts] for texts in BY_HAND[task.label]]
    assert [core_eval.prompts(replace(task, num_shots=0), index) for index in (0, 1)] == without_shots


@pytest.mark.parametrize("num_items", [1, 2, 4, 40])
def test_shots_are_drawn_from_the_others_by_the_published_seed(num_items):
    """All others where they are too few."""
    items = tuple({"query": f"q{number}", "choices": ["a", "b"], "gold": 0} for number in range(num_items))
    for index in range(num_items):
        others = [item for item in items if item is not items[index]]
        expected = random.Random(1234 + index).sample(others, min(10, num_items - 1))
        assert core_eval.shots(Task("x", MULTIPLE_CHOICE, 10, " ", 0.5, items), index) == expected


# ---- which tokens are scored, by hand ----


@pytest.mark.parametrize(
    ("kind", "encoded", "max_len", "expected"),
    [
        (MULTIPLE_CHOICE, [[0, 1, 2, 3], [0, 1, 4]], 9, [([0, 1, 2, 3], 2), ([0, 1, 4], 2)]),
        (MULTIPLE_CHOICE, [[0, 1, 2], [0, 1, 2, 3]], 9, [([0, 1, 2], 2), ([0, 1, 2, 3], 2)]),  # one begins the other
        (MULTIPLE_CHOICE, [[0, 1, 2], [0, 1, 2]], 9, [([0, 1, 2], 2), ([0, 1, 2], 2)]),  # the same twice
        (MULTIPLE_CHOICE, [[0, 1, 2, 3, 4], [0, 1, 2, 5]], 3, [([2, 3, 4], 1), ([1, 2, 5], 2)]),  # cut on the left
        (MULTIPLE_CHOICE, [[0, 1, 2, 3, 4], [0, 5]], 3, [([2, 3, 4], 1), ([0, 5], 1)]),  # an answer too long
        (SCHEMA, [[0, 1, 2, 7, 8], [0, 3, 7, 8]], 9, [([0, 1, 2, 7, 8], 3), ([0, 3, 7, 8], 2)]),
        (SCHEMA, [[0, 1, 2, 7, 8], [0, 3, 7, 8]], 4, [([1, 2, 7, 8], 2), ([0, 3, 7, 8], 2)]),
        (SCHEMA, [[0, 7], [0, 7]], 9, [([0, 7], 1), ([0, 7], 1)]),
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
    assert [core_eval._first_least([1.0 + more, 1.0]) for more in (0.0, 2e-6, 1e-4, math.nan)] == [0, 0, 1, 1]
    assert core_eval._first_least([math.nan, math.nan]) == 0  # a broken model has a score and no error


# ---- a real model, against one item at a time ----


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
    tasks = (
        Task("choices", MULTIPLE_CHOICE, 0, " ", 0.25, tuple(choices)),
        Task("choices after two", MULTIPLE_CHOICE, 2, " ", 0.25, tuple(choices)),
        Task("contexts", SCHEMA, 1, " ", 0.5, tuple(contexts)),
        Task("cloze", LANGUAGE_MODELING, 0, "", 0.0, tuple(cloze)),
    )
    return SimpleNamespace(model=model, tasks=tasks, alone=core_eval.evaluate(model, LETTERS, tasks, ALONE, 100))


def right_by_definition(model, task, index):
    """Whether the model solves an item: its prompts one at a time, whole logits in float64."""
    nats = []
    for ids, start in core_eval.sequences(task.kind, encoded(task, index), 24):
        logits = model.logits(torch.tensor([ids]))[0].double()[start - 1 : -1]
        if task.kind == LANGUAGE_MODELING:
            return logits.argmax(-1).tolist() == ids[start:]
        nats.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])).item())
    return nats.index(min(nats)) == task.items[index]["gold"]


def test_a_real_model_gives_the_definition(case):
    expected = [sum(right_by_definition(case.model, task, index) for index in range(13)) / 13 for task in case.tasks]
    assert all(0 < accuracy < 1 for accuracy in expected)
    assert [score.accuracy for score in case.alone] == expected


@pytest.mark.parametrize("world_size", [1, 2, 20])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_neither_the_number_of_ranks_nor_the_batch_size_changes_anything(case, world_size, batch_size):
    found = on_every_rank(
        world_size, lambda rank: core_eval.evaluate(case.model, LETTERS, case.tasks, rank, batch_size)
    )
    assert found == [case.alone] * world_size


@pytest.mark.parametrize("batch_size", [1, 8])
def test_losses_are_those_of_the_models_logits_whatever_the_batch(case, batch_size):
    task = case.tasks[1]
    batch = [one for index in range(13) for one in core_eval.sequences(task.kind, encoded(task, index), 24)]
    expected = []
    for ids, start in batch:
        logits = case.model.logits(torch.tensor([ids[:-1]]))[0, start - 1 :].double()
        expected.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])).item())
    assert core_eval._scores(case.model, batch, False, ALONE, batch_size) == pytest.approx(expected, rel=1e-6)


def test_blocks_of_items_change_nothing(case, monkeypatch):
    monkeypatch.setattr(core_eval, "BLOCK_ITEMS", 3)
    done = []
    assert core_eval.evaluate(case.model, LETTERS, case.tasks, ALONE, 4, done.append) == case.alone
    assert done == [3, 3, 3, 3, 1] * len(case.tasks)


def test_items_go_through_the_model_in_bounded_batches_and_only_scored_places_get_logits(case, monkeypatch):
    shapes, places, hidden, token_losses = [], [], case.model.hidden, loss.token_losses

    def counted_losses(hidden, *rest):
        assert not hidden.requires_grad
        places.append(len(hidden))
        return token_losses(hidden, *rest)

    monkeypatch.setattr(case.model, "hidden", lambda tokens: shapes.append(tokens.shape) or hidden(tokens))
    monkeypatch.setattr(loss, "token_losses", counted_losses)
    core_eval.evaluate(case.model, LETTERS, case.tasks[:1], ALONE, 2)
    assert max(rows * width for rows, width in shapes) <= 2 * 24
    assert sum(rows for rows, _ in shapes) == 13 * 4
    assert len(shapes) < 13 * 4 / 1.5
    found = [core_eval.sequences(MULTIPLE_CHOICE, encoded(case.tasks[0], index), 24) for index in range(13)]
    assert sum(places) == sum(len(ids) - start for some in found for ids, start in some)


def test_generators_and_gradients_are_left_alone(case):
    before = random.getstate(), torch.get_rng_state().tolist()
    core_eval.evaluate(case.model, LETTERS, case.tasks, ALONE, 4)
    assert (random.getstate(), torch.get_rng_state().tolist()) == before
    assert torch.is_grad_enabled()


# ---- the metric, by hand ----

SCORES = [Score("a", 100, 0.5, 0.25), Score("b", 400, 0.8, 0.62), Score("c", 25, 0.0, 0.0)]


def test_centred_scores_and_errors_by_hand():
    assert [score.centered for score in SCORES] == pytest.approx([1 / 3, 0.18 / 0.38, 0.0])
    assert [score.standard_error for score in SCORES] == pytest.approx([0.05, 0.02, 0.0])
    metric, standard_error = core_eval.core_metric(SCORES)
    assert metric == pytest.approx((1 / 3 + 0.18 / 0.38) / 3)
    assert standard_error == pytest.approx(math.sqrt((0.05 / 0.75) ** 2 + (0.02 / 0.38) ** 2) / 3)
    # What nanochat prints for these accuracies, with the baselines of v1.
    assert Score("agi_eval_lsat_ar", 16, 1 / 16, 0.20).centered == pytest.approx(-0.1719, abs=5e-5)
    assert Score("bigbench_language_identification", 10000, 0.2523, 0.091).centered == pytest.approx(0.1774, abs=5e-5)


def test_the_table_and_the_headline_say_what_the_score_is():
    bundle = Bundle((), "5a")
    assert core_eval.table(SCORES).splitlines()[1].split() == ["a", "0.5000", "0.0500", "0.2500", "0.3333", "100"]
    assert core_eval.headline(bundle, SCORES).startswith("tasks 0.2690 +- 0.0283 (3 tasks that are not CORE")
    assert len(core_bundle.CORE_LABELS) == 22
    real = Bundle(tuple(replace(CLOZE, label=label) for label in core_bundle.CORE_LABELS), "5a")
    assert core_eval.headline(real, SCORES).startswith("CORE 0.2690 +- 0.0283 ")
    result = core_eval.summary(bundle, SCORES)
    assert (result["accuracy"], result["baseline"]) == (pytest.approx(1.3 / 3), pytest.approx(0.87 / 3))
    assert (result["core_metric"], result["standard_error"]) == core_eval.core_metric(SCORES)
    assert result["tasks"]["b"]["num_items"] == 400
    assert (result["is_core"], result["bundle_sha256"]) == (False, "5a")

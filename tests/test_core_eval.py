"""CORE against prompts and scores written out by hand, and against one item at a time through all logits."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE, make_model, make_shards, on_every_rank

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


class ToyModel:
    """logits(tokens (B, T)) -> (B, T, V) are what it is given; the hidden state of a place is its logits."""

    def __init__(self, logits, vocab_size, max_seq_len=1000):
        self.hidden, self.config = logits, SimpleNamespace(max_seq_len=max_seq_len, softcap=15.0)
        self.lm_head = SimpleNamespace(weight=torch.eye(vocab_size))


def knowing(texts, tokenizer):
    """A model that has learned these texts by heart, and nothing else: whatever it does not know is uniform."""
    following = {}
    for ids in tokenizer.encode_batch(texts):
        ids = (tokenizer.bos, *ids)
        following |= {ids[:place]: ids[place] for place in range(1, len(ids))}

    def logits(tokens):
        found = torch.zeros(*tokens.shape, tokenizer.vocab_size)
        for row, ids in enumerate(tokens.tolist()):
            for place in range(len(ids)):
                if tuple(ids[: place + 1]) in following:
                    found[row, place, following[tuple(ids[: place + 1])]] = 100.0
        return found

    return ToyModel(logits, tokenizer.vocab_size)


def unigram(logits_of):
    """A model for LETTERS that gives these logits to characters, and 0 to the others, whatever stands before."""
    row = torch.zeros(LETTERS.vocab_size)
    for character, value in logits_of.items():
        row[1 + ALPHABET.index(character)] = value
    return ToyModel(lambda tokens: row.expand(*tokens.shape, -1), LETTERS.vocab_size)


def accuracies(model, tasks, tokenizer=LETTERS, batch_size=4):
    return [score.accuracy for score in core_eval.evaluate(model, tokenizer, tasks, ALONE, batch_size)]


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
RIGHT = {"choices": [0, 1], "contexts": [1, 0], "cloze": [1, 1]}  # places in BY_HAND
THREE = (CHOICES, CONTEXTS, CLOZE)


@pytest.mark.parametrize("task", THREE, ids=lambda task: task.label)
def test_prompts_are_those_written_by_hand(task):
    assert [core_eval.prompts(task, index) for index in (0, 1)] == BY_HAND[task.label]


@pytest.mark.parametrize("task", THREE, ids=lambda task: task.label)
def test_without_shots_only_the_item_is_shown(task):
    bare = Task(task.label, task.kind, 0, task.delimiter, task.baseline, task.items)
    expected = [[text.partition("\n\n")[2] for text in texts] for texts in BY_HAND[task.label]]
    assert [core_eval.prompts(bare, index) for index in (0, 1)] == expected


def test_shots_are_drawn_from_the_others_by_the_published_seed():
    items = tuple({"query": f"q{number}", "choices": ["a", "b"], "gold": 0} for number in range(40))
    task = Task("x", MULTIPLE_CHOICE, 10, " ", 0.5, items)
    for index in range(40):
        others = [item for item in items if item is not items[index]]
        assert core_eval.shots(task, index) == random.Random(1234 + index).sample(others, 10)


def test_fewer_items_than_shots_are_all_shown():
    items = tuple({"query": query, "choices": ["a", "b"], "gold": 0} for query in "hijk")
    for count in (1, 2, 4):
        task = Task("x", MULTIPLE_CHOICE, 10, " ", 0.5, items[:count])
        for index in range(count):
            shown = core_eval.shots(task, index)
            assert sorted(item["query"] for item in shown) == [
                query for query in "hijk"[:count] if query != "hijk"[index]
            ]
        assert accuracies(unigram({"b": 1.0}), [task]) == [0.0]


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


def choose(*choices, gold, query="q"):
    item = {"query": query, "choices": list(choices), "gold": gold}
    return Task("x", MULTIPLE_CHOICE, 0, " ", 0.5, (item,))


MODEL_XYZ = unigram({"x": 4.0, "y": 3.0, "z": 2.0})  # x is the likeliest, then y, then z, then everything else


@pytest.mark.parametrize(
    ("task", "accuracy"),
    [
        (choose("x", "z", gold=0), 1.0),
        (choose("x", "z", gold=1), 0.0),
        (choose("xyxy", "z", gold=0), 1.0),  # the mean decides, not the sum
        (choose("zzzx", "zzzzy", gold=0), 1.0),  # what they begin with does not count: x against the mean of z and y
        (choose("xz", "xzyyyy", gold=1), 1.0),  # one begins the other: z against the mean of z and y four times
        (choose("y", "x", "x", gold=1), 1.0),  # of equal ones the first
        (choose("y", "x", "x", gold=2), 0.0),
    ],
)
def test_the_likeliest_choice_by_hand(task, accuracy):
    assert accuracies(MODEL_XYZ, [task]) == [accuracy]


def test_mean_losses_are_those_computed_by_hand():
    weights = {c: math.exp(15 * math.tanh(v / 15)) for c, v in {"x": 4.0, "y": 3.0, "z": 2.0}.items()}
    total = sum(weights.values()) + LETTERS.vocab_size - 3
    nats = {c: -math.log(weight / total) for c, weight in weights.items()}
    batch = [([0, *LETTERS.encode_batch([text])[0]], start) for text, start in (("xyz", 2), ("zz", 1), ("yxxxx", 1))]
    expected = [(nats["y"] + nats["z"]) / 2, nats["z"], (nats["y"] + 4 * nats["x"]) / 5]
    assert core_eval._scores(MODEL_XYZ, batch, False, ALONE, 1) == pytest.approx(expected, rel=1e-6)
    shifted = [(ids, start + 1) for ids, start in batch if start + 1 < len(ids)]
    assert core_eval._scores(MODEL_XYZ, shifted, False, ALONE, 1) != pytest.approx(expected, rel=1e-2)


def test_choices_that_differ_by_rounding_are_equal_and_the_first_counts():
    assert [core_eval._first_least([1.0 + more, 1.0]) for more in (0.0, 2e-6, 1e-4)] == [0, 0, 1]


def test_the_likelier_context_by_hand():
    """After x comes y, after anything else z."""
    x, y, z = (1 + ALPHABET.index(character) for character in "xyz")

    def logits(tokens):
        found = torch.zeros(*tokens.shape, LETTERS.vocab_size)
        found[..., z] = 5.0
        found[tokens == x] = torch.eye(LETTERS.vocab_size)[y] * 5.0
        return found

    items = [{"context_options": ["zzz", "zzx"], "continuation": "y", "gold": gold} for gold in (1, 0)]
    tasks = [Task("x", SCHEMA, 0, "", 0.5, (item,)) for item in items]
    assert accuracies(ToyModel(logits, LETTERS.vocab_size), tasks) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("known", "accuracy"), [("a b c d", 1.0), ("a b c e", 0.0), ("a b d d", 0.0), ("a b c", 0.0), ("a b c d e", 1.0)]
)
def test_every_token_of_a_continuation_must_be_written(known, accuracy):
    task = Task("x", LANGUAGE_MODELING, 0, " ", 0.0, ({"context": "a b", "continuation": "c d"},))
    assert accuracies(knowing([known], LETTERS), [task]) == [accuracy]


def test_a_model_that_knows_the_answers_scores_one_and_any_mistake_is_noticed():
    right = [BY_HAND[task.label][index][RIGHT[task.label][index]] for task in THREE for index in (0, 1)]
    scores = core_eval.evaluate(knowing(right, LETTERS), LETTERS, THREE, ALONE, 2)
    assert [score.accuracy for score in scores] == [1.0, 1.0, 1.0]
    assert core_eval.core_metric(scores) == (1.0, 0.0)
    wrong = [BY_HAND["choices"][0][1], BY_HAND["contexts"][1][1], "one two three\n\na b d d"]
    for task, text in zip(THREE, wrong, strict=True):
        scores = core_eval.evaluate(knowing([text], LETTERS), LETTERS, [task], ALONE, 2)
        assert scores[0].accuracy < 1.0, task.label


# ---- a bundle of many items ----


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("core")
    make_shards(folder / "data", documents=60)
    core_bundle.make(folder / "bundle", folder / "data" / "shard_00002.parquet", 64)
    return core_bundle.read(folder / "bundle")


def test_a_uniform_model_scores_about_zero(bundle, tokenizer):
    model = ToyModel(lambda tokens: torch.zeros(*tokens.shape, tokenizer.vocab_size), tokenizer.vocab_size)
    scores = core_eval.evaluate(model, tokenizer, bundle.tasks, ALONE, 4)
    metric, standard_error = core_eval.core_metric(scores)
    assert 0 < standard_error < 0.05
    assert abs(metric) < 3 * standard_error
    for task, score in zip(bundle.tasks, scores, strict=True):  # all choices are equal, and the first counts
        first = sum(item.get("gold") == 0 for item in task.items) / len(task.items)
        assert score.accuracy == first
        assert (score.label, score.num_items) == (task.label, len(task.items))


def test_a_model_that_knows_the_bundle_scores_one(bundle, tokenizer):
    texts = []
    for task in bundle.tasks:
        for index, item in enumerate(task.items):
            others = [other for other in task.items if other is not item]
            shown = random.Random(1234 + index).sample(others, task.num_shots)
            texts.append("\n\n".join(solved(task.kind, one) for one in [*shown, item]))
    scores = core_eval.evaluate(knowing(texts, tokenizer), tokenizer, bundle.tasks, ALONE, 2)
    assert {score.label: score.accuracy for score in scores} == {task.label: 1.0 for task in bundle.tasks}
    assert core_eval.core_metric(scores)[0] == 1.0


def solved(kind, item):
    if kind == MULTIPLE_CHOICE:
        return f"{item['query']} {item['choices'][item['gold']]}"
    if kind == SCHEMA:
        return f"{item['context_options'][item['gold']]} {item['continuation']}"
    return f"{item['context']} {item['continuation']}"


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
    alone = core_eval.evaluate(model, LETTERS, tasks, ALONE, 100)
    return SimpleNamespace(model=model, tasks=tasks, alone=alone)


def right_by_definition(model, task, index):
    """Whether the model solves an item: its prompts one at a time, whole logits in float64."""
    encoded = [[0, *ids] for ids in LETTERS.encode_batch(core_eval.prompts(task, index))]
    nats = []
    for ids, start in core_eval.sequences(task.kind, encoded, 24):
        logits = model.logits(torch.tensor([ids]))[0].double()[start - 1 : -1]
        if task.kind == LANGUAGE_MODELING:
            return logits.argmax(-1).tolist() == ids[start:]
        nats.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])).item())
    return nats.index(min(nats)) == task.items[index]["gold"]


def test_a_real_model_gives_the_definition(case):
    expected = [sum(right_by_definition(case.model, task, index) for index in range(13)) / 13 for task in case.tasks]
    assert all(0 < accuracy < 1 for accuracy in expected)
    assert accuracies(case.model, case.tasks) == expected


@pytest.mark.parametrize("world_size", [1, 2, 4, 20])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_neither_the_number_of_ranks_nor_the_batch_size_changes_anything(case, world_size, batch_size):
    found = on_every_rank(
        world_size, lambda rank: core_eval.evaluate(case.model, LETTERS, case.tasks, rank, batch_size)
    )
    assert found == [case.alone] * world_size


def test_losses_are_those_of_the_models_logits_in_float32(case):
    encoded = [[0, *ids] for ids in LETTERS.encode_batch(core_eval.prompts(case.tasks[1], 0))]
    batch = core_eval.sequences(case.tasks[1].kind, encoded, 24)
    for (ids, start), found in zip(batch, core_eval._scores(case.model, batch, False, ALONE, 4), strict=True):
        logits = case.model.logits(torch.tensor([ids[:-1]]))[0, start - 1 :].double()
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])).item()
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_losses_do_not_depend_on_the_batch(case, batch_size):
    task = case.tasks[1]
    encoded = [[[0, *ids] for ids in LETTERS.encode_batch(core_eval.prompts(task, index))] for index in range(13)]
    batch = [one for ids in encoded for one in core_eval.sequences(task.kind, ids, 24)]
    together = core_eval._scores(case.model, batch, False, ALONE, batch_size)
    one_by_one = [core_eval._scores(case.model, [one], False, ALONE, 1)[0] for one in batch]
    assert together == pytest.approx(one_by_one, rel=1e-6)


def test_blocks_of_items_change_nothing(case, monkeypatch):
    monkeypatch.setattr(core_eval, "BLOCK_ITEMS", 3)
    done = []
    assert core_eval.evaluate(case.model, LETTERS, case.tasks, ALONE, 4, done.append) == case.alone
    assert done == [3, 3, 3, 3, 1] * len(case.tasks)


def test_an_item_left_out_is_noticed(case):
    def shorter(task):
        return Task(task.label, task.kind, task.num_shots, task.delimiter, task.baseline, task.items[:-1])

    assert accuracies(case.model, [shorter(task) for task in case.tasks]) != accuracies(case.model, case.tasks)


def test_items_go_through_the_model_together_in_bounded_batches_and_only_scored_places_get_logits(case, monkeypatch):
    shapes, places = [], []
    hidden, token_losses, greedy_tokens = case.model.hidden, loss.token_losses, loss.greedy_tokens
    monkeypatch.setattr(case.model, "hidden", lambda tokens: shapes.append(tuple(tokens.shape)) or hidden(tokens))
    monkeypatch.setattr(case.model, "logits", None)
    for name, function in (("token_losses", token_losses), ("greedy_tokens", greedy_tokens)):
        counted = lambda h, w, *rest, function=function: places.append(len(h)) or function(h, w, *rest)  # noqa: E731
        monkeypatch.setattr(loss, name, counted)
    accuracies(case.model, case.tasks, batch_size=2)
    assert max(rows * width for rows, width in shapes) <= 2 * 24
    sequences = 13 * (4 + 4 + 2 + 1)
    assert sum(rows for rows, _ in shapes) == sequences
    assert len(shapes) < sequences / 1.5
    assert sum(places) < sum(rows * width for rows, width in shapes) / 3
    scored = sum(
        len(ids) - start
        for task in case.tasks
        for index in range(13)
        for ids, start in core_eval.sequences(
            task.kind, [[0, *ids] for ids in LETTERS.encode_batch(core_eval.prompts(task, index))], 24
        )
    )
    assert sum(places) == scored


def test_generators_are_left_as_they_were(case):
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state().tolist()
    accuracies(case.model, case.tasks)
    assert (random.getstate(), torch.get_rng_state().tolist()) == before
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in case.model.parameters())


def test_a_model_that_is_not_finite_has_a_score_and_no_error():
    model = ToyModel(lambda tokens: torch.full((*tokens.shape, LETTERS.vocab_size), math.nan), LETTERS.vocab_size)
    assert accuracies(model, THREE) == [0.5, 0.5, 0.0]  # the first choice, the first context, nothing


# ---- the metric, by hand ----

SCORES = [Score("a", 100, 0.5, 0.25), Score("b", 400, 0.8, 0.62), Score("c", 25, 0.0, 0.0)]


def test_centred_scores_and_errors_by_hand():
    assert [score.centered for score in SCORES] == pytest.approx([1 / 3, 0.18 / 0.38, 0.0])
    assert [score.standard_error for score in SCORES] == pytest.approx([0.05, 0.02, 0.0])
    metric, standard_error = core_eval.core_metric(SCORES)
    assert metric == pytest.approx((1 / 3 + 0.18 / 0.38) / 3)
    assert standard_error == pytest.approx(math.sqrt((0.05 / 0.75) ** 2 + (0.02 / 0.38) ** 2) / 3)
    below = Score("d", 10, 0.1, 0.25)
    assert below.centered == pytest.approx(-0.2)  # worse than guessing counts against it


def test_the_table_and_the_line_say_what_the_score_is():
    bundle = Bundle((), "5a")
    first = core_eval.table(SCORES).splitlines()[1]
    assert first.split() == ["a", "0.5000", "0.0500", "0.2500", "0.3333", "100"]
    assert core_eval.headline(bundle, SCORES) == "tasks 0.2690 +- 0.0283 (3 tasks that are not CORE; guessing gives 0)"
    labels = sorted(core_bundle.CORE_LABELS)
    assert len(labels) == 22
    real = Bundle(tuple(Task(label, SCHEMA, 0, " ", 0.5, ()) for label in labels), "5a")
    scores = [Score(label, 4, 0.75, 0.5) for label in labels]
    assert core_eval.headline(real, scores).startswith("CORE 0.5000 +- ")
    assert core_eval.headline(real, scores).endswith(" (22 tasks, random baselines of DCLM v1)")
    result = core_eval.summary(bundle, SCORES)
    assert (result["accuracy"], result["baseline"]) == (pytest.approx(1.3 / 3), pytest.approx(0.87 / 3))
    assert result["core_metric"] == core_eval.core_metric(SCORES)[0]
    assert result["tasks"]["b"]["num_items"] == 400
    assert (result["is_core"], result["bundle_sha256"]) == (False, "5a")


def test_published_scores_come_out_of_published_accuracies():
    """Random guessing at v1 baselines is 0 for each task; 1/16 on LSAT is what nanochat prints as -0.1719."""
    assert Score("agi_eval_lsat_ar", 16, 1 / 16, 0.20).centered == pytest.approx(-0.1719, abs=5e-5)
    assert Score("commonsense_qa", 16, 2 / 16, 0.20).centered == pytest.approx(-0.0938, abs=5e-5)
    assert Score("bigbench_language_identification", 10000, 0.2523, 0.091).centered == pytest.approx(0.1774, abs=5e-5)

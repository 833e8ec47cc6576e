"""The CORE metric of DCLM (arXiv:2406.11794): tasks that are read, not taught, each scored against guessing.

    multiple_choice     which choice makes the text likeliest? (mean loss of its tokens)
    schema              which context makes the continuation likeliest? (mean loss of its tokens)
    language_modeling   is the continuation, token by token, what the model would write? (all must be right)

A task's centred score is (accuracy - b) / (1 - b), b the accuracy of guessing; CORE is the mean over 22 tasks. Prompts,
solved examples and the order of items are those of the published metric; the baselines are those of DCLM v1, as in
nanochat's published scores.

    python -m nanotrain.core_eval --make-bundle=DIR --data-dir=D     make tasks of a validation shard, without a network
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nanotrain import config, core_bundle, dataset, errors, loss, paths
from nanotrain.core_bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA, Bundle, Task
from nanotrain.errors import UserError

if TYPE_CHECKING:
    from nanotrain.dist import DistContext
    from nanotrain.tokenizer import BPETokenizer

# --- a bundle of tasks from your own text
MAKE_BUNDLE = ""  # folder to write it to; own: the one that --core-bundle=own reads
DATA_DIR = ""  # folder of shards, whose validation shard is used; empty: the only data set in NANOTRAIN_DIR/data
ITEMS_PER_TASK = 200  # at most
# ----------------------------------------

SHOT_SEED = 1234  # plus the number of an item: which others stand before it, as published
TIE_NATS = 1e-5  # choices this close are equally likely, and the first counts: rounding must not decide
BLOCK_ITEMS = 256  # that are tokenized at a time, which bounds memory


@dataclass(frozen=True)
class Score:
    """What a model did on a task; accuracies and their standard errors are in [0, 1]."""

    label: str
    num_items: int
    accuracy: float
    baseline: float

    @property
    def centered(self) -> float:
        """0 for guessing, 1 for all right."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    @property
    def standard_error(self) -> float:
        """Of the accuracy: how far another draw of as many items would typically lie."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_items)


# ---- prompts ----


def shots(task: Task, index: int) -> list[dict]:
    """The items that stand solved before item `index`: drawn from the others, all of them if they are too few."""
    num_others = len(task.items) - 1
    drawn = random.Random(SHOT_SEED + index).sample(range(num_others), min(task.num_shots, num_others))
    return [task.items[number + (number >= index)] for number in drawn]


def prompts(task: Task, index: int) -> list[str]:
    """The texts that the model reads for item `index`: one for each choice (multiple_choice) or context (schema), or
    the text without and with its continuation (language_modeling).
    """
    item = task.items[index]
    before = "".join(task.delimiter.join(_solved(task.kind, shot)) + "\n\n" for shot in shots(task, index))
    if task.kind == MULTIPLE_CHOICE:
        return [f"{before}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == SCHEMA:
        return [f"{before}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    question = f"{before}{item['context'].strip()}{task.delimiter}"
    # without the space at its end, which most tokenizers put into the first token of the continuation
    return [question.strip(), question + item["continuation"]]


def _solved(kind, item):
    """(question, right answer)."""
    if kind == MULTIPLE_CHOICE:
        return item["query"], item["choices"][item["gold"]]
    if kind == SCHEMA:
        return item["context_options"][item["gold"]], item["continuation"]
    return item["context"].strip(), item["continuation"]


def sequences(kind: str, encoded: Sequence[list[int]], max_len: int) -> list[tuple[list[int], int]]:
    """Prompts as token ids -> [(ids, start)]: what goes through the model, and where the tokens that are scored begin
    (to the end); at least one is, and none at place 0, which nothing predicts.

    Longer than max_len are cut on the left, and an answer that alone is longer is scored by its end.
    """
    if kind == LANGUAGE_MODELING:
        starts, encoded = [_common_prefix(encoded)], encoded[1:]
    elif kind == MULTIPLE_CHOICE:
        # A choice may be a prefix of another: then its last token is scored, and the same place of the others.
        starts = [min(_common_prefix(encoded), min(map(len, encoded)) - 1)] * len(encoded)
    else:
        same = _common_prefix([ids[::-1] for ids in encoded])
        starts = [len(ids) - same for ids in encoded]
    found = []
    for ids, start in zip(encoded, starts, strict=True):
        cut = max(len(ids) - max(max_len, 2), 0)
        found.append((ids[cut:], max(min(start, len(ids) - 1) - cut, 1)))
    return found


def _common_prefix(sequences):
    """The number of tokens that all of them begin with."""
    return sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


# ---- scores ----


def evaluate(
    model: nn.Module,
    tokenizer: "BPETokenizer",
    tasks: Sequence[Task],
    dist: "DistContext",
    batch_size: int,
    progress: Callable[[int], object] | None = None,
) -> list[Score]:
    """The scores of the tasks, the same on every rank.

    The items are dealt to the ranks by index and batched by length, as many tokens per forward pass as `batch_size`
    sequences of full length have. `progress` is called with the number of items done.
    """
    right = [_num_right(model, tokenizer, task, dist, batch_size, progress) for task in tasks]
    return [
        Score(task.label, len(task.items), total / len(task.items), task.baseline)
        for task, total in zip(tasks, dist.all_reduce_sum(right), strict=True)
    ]


def _num_right(model, tokenizer, task, dist, batch_size, progress):
    """How many items of this rank the model gets right."""
    mine, right = range(dist.rank, len(task.items), dist.world_size), 0
    for begin in range(0, len(mine), BLOCK_ITEMS):
        block = mine[begin : begin + BLOCK_ITEMS]
        texts = [prompts(task, index) for index in block]
        encoded = iter(tokenizer.encode_batch([text for some in texts for text in some]))
        found = [
            sequences(task.kind, [[tokenizer.bos, *next(encoded)] for _ in some], model.config.max_seq_len)
            for some in texts
        ]
        flat = [sequence for some in found for sequence in some]
        scores = iter(_scores(model, flat, task.kind == LANGUAGE_MODELING, dist, batch_size))
        for index, some in zip(block, found, strict=True):
            of_item = [next(scores) for _ in some]
            if task.kind == LANGUAGE_MODELING:
                right += of_item[0] == 1
            else:
                right += _first_least(of_item) == task.items[index]["gold"]
        if progress:
            progress(len(block))
    return right


def _first_least(losses):
    values = [math.inf if math.isnan(value) else value for value in losses]
    return next(place for place, value in enumerate(values) if value <= min(values) + TIE_NATS)


def _scores(model, sequences, greedy, dist, batch_size):
    """For each (ids, start) the mean loss in nats of the tokens from `start`, or, if `greedy`, the share of them that
    the model itself would write.
    """
    scores = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place][0]))
    while order:
        size = max(batch_size * model.config.max_seq_len // len(sequences[order[-1]][0]), 1)
        batch, order = order[-size:], order[:-size]  # the longest that are left
        for place, score in zip(batch, _batch_scores(model, [sequences[p] for p in batch], greedy, dist), strict=True):
            scores[place] = score
    return scores


@torch.no_grad()
def _batch_scores(model, batch, greedy, dist):
    """`_scores` of sequences that go through the model together. Only scored places get logits, in float32."""
    inputs = torch.zeros(len(batch), max(len(ids) for ids, _ in batch) - 1, dtype=torch.int64)
    scored = torch.zeros(inputs.shape, dtype=torch.bool)
    for row, (ids, start) in enumerate(batch):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])  # what is on the right of it changes nothing
        scored[row, start - 1 : len(ids) - 1] = True
    targets = torch.tensor([token for ids, start in batch for token in ids[start:]], device=dist.device)
    with dist.autocast():
        hidden = model.hidden(inputs.to(dist.device))
    hidden = hidden[scored.to(dist.device)].float()
    if greedy:
        values = loss.greedy_tokens(hidden, model.lm_head.weight) == targets
    else:
        values = loss.token_losses(hidden, model.lm_head.weight, targets, model.config.softcap)
    return [some.mean().item() for some in values.cpu().double().split([len(ids) - start for ids, start in batch])]


# ---- the result ----


def core_metric(scores: Sequence[Score]) -> tuple[float, float]:
    """(mean of the centred scores, its standard error)."""
    errors_of_centered = [score.standard_error / (1 - score.baseline) for score in scores]
    return sum(score.centered for score in scores) / len(scores), math.hypot(*errors_of_centered) / len(scores)


def summary(bundle: Bundle, scores: Sequence[Score]) -> dict[str, Any]:
    """The scores as a JSON-like dict, the mean under `core_metric`."""
    metric, standard_error = core_metric(scores)
    return {
        "core_metric": metric,
        "standard_error": standard_error,
        "accuracy": sum(score.accuracy for score in scores) / len(scores),
        "baseline": sum(score.baseline for score in scores) / len(scores),
        "is_core": bundle.is_core,
        "bundle_sha256": bundle.sha256,
        "tasks": {
            score.label: {**asdict(score), "centered": score.centered, "standard_error": score.standard_error}
            for score in scores
        },
    }


def headline(bundle: Bundle, scores: Sequence[Score]) -> str:
    """The mean in one line, with what it may be called and what it is to be compared with."""
    metric, standard_error = core_metric(scores)
    if bundle.is_core:
        name = "CORE"
        baselines = "22 tasks, random baselines of DCLM v1"
    else:
        name = "tasks"
        baselines = f"{len(scores)} tasks that are not CORE; guessing gives 0"
    return f"{name} {metric:.4f} +- {standard_error:.4f} ({baselines})"


def table(scores: Sequence[Score]) -> str:
    """A line for each task: accuracy, its standard error, what guessing gives, the centred score, number of items."""
    lines = [f"{'task':<34}{'accuracy':>9}{'+-':>8}{'guessing':>10}{'centred':>9}{'items':>8}"]
    for score in scores:
        lines.append(
            f"{score.label:<34}{score.accuracy:>9.4f}{score.standard_error:>8.4f}{score.baseline:>10.4f}"
            f"{score.centered:>9.4f}{score.num_items:>8,}"
        )
    return "\n".join(lines)


def main() -> None:
    if not MAKE_BUNDLE:
        raise UserError("nothing to do: --make-bundle=DIR makes a bundle of tasks (scripts.base_eval evaluates on one)")
    if ITEMS_PER_TASK < 1:
        raise UserError(f"--items-per-task={ITEMS_PER_TASK}: at least 1")
    shards = dataset.open_shards(paths.data_dir(DATA_DIR))
    path = shards.validation.path
    folder = core_bundle.own_folder(paths.core_dir(), path) if MAKE_BUNDLE == core_bundle.OWN else MAKE_BUNDLE
    counts = core_bundle.make(folder, path, ITEMS_PER_TASK)
    listed = ", ".join(f"{count} {label}" for label, count in counts.items())
    print(f"{folder}, of {shards.validation.path.name}:\n{listed}")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)

"""The CORE metric of DCLM (arXiv:2406.11794): in-context tasks, each scored against random guessing.

    multiple_choice     which choice makes the text likeliest? (mean loss of its tokens)
    schema              which context makes the continuation likeliest? (mean loss of its tokens)
    language_modeling   is the continuation, token by token, what the model would write? (all must be right)

A task's centred score is (accuracy - b) / (1 - b), b the accuracy of random guessing; CORE is the mean over 22 tasks.
Prompts, few-shot examples and the order of items are those of the published metric; the baselines are those of DCLM v1,
as in nanochat's published scores.

    python -m nanotrain.core_eval --make-bundle=DIR --data-dir=D     make tasks of a validation shard, without a network
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, takewhile
from typing import Any

import torch
from torch import nn

from nanotrain import config, core_bundle, dataset, errors, loss, paths
from nanotrain.core_bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA, Bundle, Task
from nanotrain.dist import DistContext
from nanotrain.errors import UserError
from nanotrain.tokenizer import BPETokenizer

# --- a bundle of tasks from your own text
MAKE_BUNDLE = ""  # folder to write it to; own: the one that --core-bundle=own reads
DATA_DIR = ""  # folder of shards, whose validation shard is used; empty: the only data set in NANOTRAIN_DIR/data
ITEMS_PER_TASK = 200  # at most
# ----------------------------------------

SHOT_SEED = 1234  # plus the index of an item: which others stand before it, as published
TIE_NATS = 1e-5  # choices this close are equally likely, and the first counts: rounding must not decide
BLOCK_ITEMS = 256  # tokenized at a time, which bounds memory


@dataclass(frozen=True)
class Score:
    """A model's result on one task; accuracies and their standard errors are in [0, 1]."""

    label: str
    num_items: int
    accuracy: float
    baseline: float

    @property
    def centered(self) -> float:
        """0 for random guessing, 1 for all right."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    @property
    def standard_error(self) -> float:
        """The standard error of the accuracy, over draws of as many items."""
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
    before = ""
    for shot in shots(task, index):
        options, gold = _options(task.kind, shot)
        before += task.delimiter.join(options[gold]) + "\n\n"
    options, _ = _options(task.kind, task.items[index])
    texts = [before + task.delimiter.join(option) for option in options]
    if task.kind == LANGUAGE_MODELING:
        # without the space at its end, which most tokenizers put into the first token of the continuation
        texts.insert(0, texts[0].removesuffix(options[0][1]).strip())
    return texts


def _options(kind, item):
    """([(question, answer), ...], index of the right one)."""
    if kind == MULTIPLE_CHOICE:
        return [(item["query"], choice) for choice in item["choices"]], item["gold"]
    if kind == SCHEMA:
        return [(context, item["continuation"]) for context in item["context_options"]], item["gold"]
    return [(item["context"].strip(), item["continuation"])], 0


def sequences(kind: str, encoded: Sequence[list[int]], max_len: int) -> list[tuple[list[int], int]]:
    """Prompts as token ids -> [(ids, start)]: what goes through the model, and where the tokens that are scored begin
    (to the end); at least one is, and none at place 0, which nothing predicts.

    Longer ones than max_len are cut on the left, and an answer that alone is longer is scored by its end.
    """
    if kind == LANGUAGE_MODELING:
        starts, encoded = [_common_prefix(encoded)], encoded[1:]
    elif kind == MULTIPLE_CHOICE:
        # A choice may be a prefix of another: then its last token is scored, and the same place of the others.
        starts = [min(_common_prefix(encoded), min(map(len, encoded)) - 1)] * len(encoded)
    else:
        common_suffix = _common_prefix([ids[::-1] for ids in encoded])
        starts = [len(ids) - common_suffix for ids in encoded]
    found = []
    for ids, start in zip(encoded, starts, strict=True):
        cut = max(len(ids) - max(max_len, 2), 0)
        found.append((ids[cut:], max(min(start, len(ids) - 1) - cut, 1)))
    return found


def _common_prefix(sequences):
    """The number of tokens that all of them begin with."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


# ---- scores ----


def evaluate(
    model: nn.Module,
    tokenizer: BPETokenizer,
    tasks: Sequence[Task],
    dist: DistContext,
    batch_size: int,
    progress: Callable[[int], object] | None = None,
) -> list[Score]:
    """The scores of the tasks, the same on every rank.

    The items are assigned to ranks by index and batched by length, as many tokens per forward pass as `batch_size`
    sequences of full length have. `progress` is called with the number of items done.
    """
    num_right = []
    for task in tasks:
        num_right.append(0)
        mine = range(dist.rank, len(task.items), dist.world_size)
        for begin in range(0, len(mine), BLOCK_ITEMS):
            block = mine[begin : begin + BLOCK_ITEMS]
            num_right[-1] += _num_right(model, tokenizer, task, block, dist, batch_size)
            if progress:
                progress(len(block))
    return [
        Score(task.label, len(task.items), total / len(task.items), task.baseline)
        for task, total in zip(tasks, dist.all_reduce_sum(num_right), strict=True)
    ]


def _num_right(model, tokenizer, task, block, dist, batch_size):
    """How many of the items whose indices are `block` the model gets right."""
    texts = [prompts(task, index) for index in block]
    encoded = iter(tokenizer.encode_batch([*chain.from_iterable(texts)]))
    found = []
    for some in texts:
        ids = [[tokenizer.bos, *next(encoded)] for _ in some]
        found.append(sequences(task.kind, ids, model.config.max_seq_len))
    greedy, right = task.kind == LANGUAGE_MODELING, 0
    scores = iter(_scores(model, [*chain.from_iterable(found)], greedy, dist, batch_size))
    for index, some in zip(block, found, strict=True):
        of_item = [next(scores) for _ in some]
        right += of_item == [1.0] if greedy else _first_least(of_item) == task.items[index]["gold"]
    return right


def _first_least(losses):
    values = [math.inf if math.isnan(value) else value for value in losses]
    return next(place for place, value in enumerate(values) if value <= min(values) + TIE_NATS)


@torch.no_grad()
def _scores(model, sequences, greedy, dist, batch_size):
    """For each (ids, start) the mean loss in nats of the tokens from `start`, or, if `greedy`, the share of them that
    the model itself would write. Only those places get logits, in float32.
    """
    scores, order = {}, sorted(range(len(sequences)), key=lambda place: len(sequences[place][0]))
    while order:
        longest = len(sequences[order[-1]][0])  # of those that are left
        size = max(batch_size * model.config.max_seq_len // longest, 1)
        batch, order = order[-size:], order[:-size]
        inputs = torch.zeros(len(batch), longest - 1, dtype=torch.int64)
        scored, targets, counts = torch.zeros(inputs.shape, dtype=torch.bool), [], []
        for row, (ids, start) in enumerate(sequences[place] for place in batch):
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])  # the padding on its right changes nothing
            scored[row, start - 1 : len(ids) - 1] = True
            targets += ids[start:]
            counts.append(len(ids) - start)
        with dist.autocast():
            hidden = model.hidden(inputs.to(dist.device))
        hidden, targets = hidden[scored.to(dist.device)].float(), torch.tensor(targets, device=dist.device)
        if greedy:
            values = loss.greedy_tokens(hidden, model.lm_head.weight) == targets
        else:
            values = loss.token_losses(hidden, model.lm_head.weight, targets, model.config.softcap)
        means = [some.mean().item() for some in values.cpu().double().split(counts)]
        scores.update(zip(batch, means, strict=True))
    return [scores[place] for place in range(len(sequences))]


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
    """The mean in one line, with what it may be called and compared with."""
    metric, standard_error = core_metric(scores)
    if bundle.is_core:
        return f"CORE {metric:.4f} +- {standard_error:.4f} (22 tasks, random baselines of DCLM v1)"
    return f"tasks {metric:.4f} +- {standard_error:.4f} ({len(scores)} tasks that are not CORE; guessing gives 0)"


def table(scores: Sequence[Score]) -> str:
    """A line for each task: accuracy, its standard error, the baseline, the centred score, number of items."""
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
    shard = dataset.open_shards(paths.data_dir(DATA_DIR)).validation.path
    folder = core_bundle.own_folder(paths.core_dir(), shard) if MAKE_BUNDLE == core_bundle.OWN else MAKE_BUNDLE
    counts = core_bundle.make(folder, shard, ITEMS_PER_TASK)
    print(f"{folder}, of {shard.name}:\n{', '.join(f'{count} {label}' for label, count in counts.items())}")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)

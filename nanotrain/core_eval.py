"""The CORE metric of DCLM (arXiv:2406.11794): in-context tasks, each scored relative to random guessing.

    multiple_choice     which choice is most likely? (lowest mean loss of its tokens)
    schema              which context makes the continuation most likely? (lowest mean loss)
    language_modeling   does greedy decoding give the continuation? (all tokens must match)

A task's centered score is (accuracy - b) / (1 - b), where b is the accuracy of random guessing; CORE is the mean over
22 tasks. Prompts, few-shot examples and item order follow the published metric; baselines are those of DCLM v1, as in
nanochat's published scores.

    python -m nanotrain.core_eval --make-bundle=DIR --data-dir=D     make tasks from a validation shard, offline
"""

import math
import random
from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from typing import Any

import torch
from torch import nn

from nanotrain import config, core_bundle, dataset, errors, loss, paths
from nanotrain.core_bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, Bundle, Task
from nanotrain.dist import DistContext
from nanotrain.errors import UserError
from nanotrain.tokenizer import BPETokenizer

# --- task bundle from your own text
MAKE_BUNDLE = ""  # output folder
DATA_DIR = ""  # folder of shards with the validation shard to use; empty: the only data set in NANOTRAIN_DIR/data
ITEMS_PER_TASK = 200  # maximum number of items per task
# ----------------------------------------

SHOT_SEED = 1234  # seed of an item's few-shot examples (plus its index), as in the published metric
TIE_NATS = 1e-5  # losses this close are ties, won by the first choice: rounding must not decide
BLOCK_ITEMS = 256  # items tokenized at a time, to bound memory


def prompts(task: Task, index: int) -> list[str]:
    """The prompts of item `index`: one per choice (multiple_choice) or context (schema), or the text without and with
    its continuation (language_modeling). Each starts with up to `task.num_shots` random other items, solved.
    """
    num_others, before = len(task.items) - 1, ""
    for number in random.Random(SHOT_SEED + index).sample(range(num_others), min(task.num_shots, num_others)):
        options, gold = task.items[number + (number >= index)]
        before += task.delimiter.join(options[gold]) + "\n\n"
    options, _ = task.items[index]
    texts = [before + task.delimiter.join(option) for option in options]
    if task.kind == LANGUAGE_MODELING:
        # strip the trailing space, which most tokenizers merge into the first token of the continuation
        texts.insert(0, texts[0].removesuffix(options[0][1]).strip())
    return texts


def sequences(kind: str, encoded: Sequence[list[int]], max_len: int) -> list[tuple[list[int], int]]:
    """Prompts as token ids -> [(ids, start)], to be scored on ids[start:]: at least one token, start >= 1.
    Sequences longer than `max_len` lose their beginning, even part of the answer if necessary.
    """
    if kind == LANGUAGE_MODELING:
        starts, encoded = [_common_prefix(encoded)], encoded[1:]
    elif kind == MULTIPLE_CHOICE:
        # A choice may be a prefix of another: then scoring starts at its last token in all of them.
        starts = [min(_common_prefix(encoded), min(map(len, encoded)) - 1)] * len(encoded)
    else:
        common_suffix = _common_prefix([ids[::-1] for ids in encoded])
        starts = [len(ids) - common_suffix for ids in encoded]
    cuts = [max(len(ids) - max(max_len, 2), 0) for ids in encoded]
    scored = zip(encoded, starts, cuts, strict=True)
    return [(ids[cut:], max(min(start, len(ids) - 1) - cut, 1)) for ids, start, cut in scored]


def _common_prefix(sequences):
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


def evaluate(
    model: nn.Module, tokenizer: BPETokenizer, bundle: Bundle, dist: DistContext, batch_size: int, done: Callable = abs
) -> dict[str, Any]:
    """Evaluate on a bundle and return its `summary`, the same on every rank.

    Items are assigned to ranks by index and batched by length, with at most `batch_size` * max_seq_len tokens per
    forward pass. `done` is called with the number of items done since its last call (default: a no-op).
    """
    num_right, max_len = [], model.config.max_seq_len
    for task in bundle.tasks:
        num_right.append(0)
        greedy, mine = task.kind == LANGUAGE_MODELING, range(dist.rank, len(task.items), dist.world_size)
        for begin in range(0, len(mine), BLOCK_ITEMS):
            block, found = mine[begin : begin + BLOCK_ITEMS], []
            for index in block:
                encoded = [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(prompts(task, index))]
                found.append(sequences(task.kind, encoded, max_len))
            scores = iter(_scores(model, [*chain(*found)], greedy, dist, batch_size))
            for index, some in zip(block, found, strict=True):
                item_scores, (_, gold) = [next(scores) for _ in some], task.items[index]
                num_right[-1] += item_scores == [1.0] if greedy else _first_least(item_scores) == gold
            done(len(block))
    return summary(bundle, dist.all_reduce_sum(num_right))


def _first_least(losses):
    return next((place for place, nats in enumerate(losses) if nats <= min(losses) + TIE_NATS), 0)  # 0: one is NaN


@torch.no_grad()
def _scores(model, sequences, greedy, dist, batch_size):
    """For each (ids, start), the mean loss in nats of ids[start:], or if `greedy`, the fraction of these tokens that
    greedy decoding gives. Logits are float32 and computed only where needed.
    """
    scores, order = {}, sorted(range(len(sequences)), key=lambda place: len(sequences[place][0]))
    while order:
        longest = len(sequences[order[-1]][0])  # longest remaining sequence
        size = max(batch_size * model.config.max_seq_len // longest, 1)
        batch, order = order[-size:], order[:-size]
        inputs = torch.zeros(len(batch), longest - 1, dtype=torch.int64)
        scored, targets, counts = torch.zeros(inputs.shape, dtype=torch.bool), [], []
        for row, (ids, start) in enumerate(sequences[place] for place in batch):
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])  # padding on the right has no effect
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


def summary(bundle: Bundle, num_right: Sequence[float]) -> dict[str, Any]:
    """A JSON-like dict of scores per task and their means; `core_metric` is the mean of the centered scores."""
    tasks = {}
    for task, right in zip(bundle.tasks, num_right, strict=True):
        count, accuracy = len(task.items), right / len(task.items)
        scores = {"label": task.label, "num_items": count, "accuracy": accuracy, "baseline": task.baseline}
        scores["centered"] = (accuracy - task.baseline) / (1 - task.baseline)  # 0 for random guessing
        tasks[task.label] = scores | {"standard_error": math.sqrt(accuracy * (1 - accuracy) / count)}
    return {
        "core_metric": sum(task["centered"] for task in tasks.values()) / len(tasks),
        "standard_error": math.hypot(*(t["standard_error"] / (1 - t["baseline"]) for t in tasks.values())) / len(tasks),
        "accuracy": sum(task["accuracy"] for task in tasks.values()) / len(tasks),
        "baseline": sum(task["baseline"] for task in tasks.values()) / len(tasks),
        "is_core": tasks.keys() == core_bundle.CORE_LABELS,  # otherwise the mean is not CORE
        "bundle_sha256": bundle.sha256,
        "tasks": tasks,
    }


def headline(result: dict[str, Any]) -> str:
    """The mean score in one line, and whether it is CORE."""
    score = f"{result['core_metric']:.4f} +- {result['standard_error']:.4f}"
    if result["is_core"]:
        return f"CORE {score} (22 tasks, random baselines of DCLM v1)"
    return f"tasks {score} ({len(result['tasks'])} tasks, not CORE; random guessing scores 0)"


def table(result: dict[str, Any]) -> str:
    """One line per task: accuracy, its standard error, baseline, centered score, number of items."""
    head = f"{'task':<34}{'accuracy':>9}{'+-':>8}{'guessing':>10}{'centered':>9}{'items':>8}"
    line = "{label:<34}{accuracy:>9.4f}{standard_error:>8.4f}{baseline:>10.4f}{centered:>9.4f}{num_items:>8,}"
    return "\n".join([head, *(line.format(**task) for task in result["tasks"].values())])


def main() -> None:
    if not MAKE_BUNDLE:
        raise UserError("nothing to do: make a task bundle with --make-bundle=DIR (scripts.base_eval evaluates on one)")
    config.check_numbers(config.snapshot(__name__), at_least_one=("ITEMS_PER_TASK",))
    shard = dataset.open_shards(paths.data_dir(DATA_DIR)).validation.path
    counts = core_bundle.make(MAKE_BUNDLE, shard, ITEMS_PER_TASK)
    print(f"{MAKE_BUNDLE}, made from {shard.name}:\n{', '.join(f'{count} {label}' for label, count in counts.items())}")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)

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
from itertools import chain, takewhile
from typing import Any

import torch
from torch import nn

from nanotrain import config, core_bundle, dataset, errors, loss, paths
from nanotrain.core_bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, Bundle, Task
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


def prompts(task: Task, index: int) -> list[str]:
    """The texts that the model reads for item `index`: one for each choice (multiple_choice) or context (schema), or
    the text without and with its continuation (language_modeling). Before it stand other items, solved: drawn ones, or
    all of them if they are too few.
    """
    num_others, before = len(task.items) - 1, ""
    for number in random.Random(SHOT_SEED + index).sample(range(num_others), min(task.num_shots, num_others)):
        options, gold = task.items[number + (number >= index)]
        before += task.delimiter.join(options[gold]) + "\n\n"
    options, _ = task.items[index]
    texts = [before + task.delimiter.join(option) for option in options]
    if task.kind == LANGUAGE_MODELING:
        # without the space at its end, which most tokenizers put into the first token of the continuation
        texts.insert(0, texts[0].removesuffix(options[0][1]).strip())
    return texts


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


def evaluate(
    model: nn.Module,
    tokenizer: BPETokenizer,
    bundle: Bundle,
    dist: DistContext,
    batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """The result on the tasks of a bundle (see `summary`), the same on every rank.

    The items are assigned to ranks by index and batched by length, as many tokens per forward pass as `batch_size`
    sequences of full length have. `progress` is called with the number of items done.
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
                of_item, (_, gold) = [next(scores) for _ in some], task.items[index]
                num_right[-1] += of_item == [1.0] if greedy else _first_least(of_item) == gold
            progress(len(block))
    return summary(bundle, dist.all_reduce_sum(num_right))


def _first_least(losses):
    return next((place for place, nats in enumerate(losses) if nats <= min(losses) + TIE_NATS), 0)  # 0: one is NaN


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


def summary(bundle: Bundle, num_right: Sequence[float]) -> dict[str, Any]:
    """The scores as a JSON-like dict: of each task, and their means; `core_metric` is that of the centred scores."""
    tasks = {}
    for task, right in zip(bundle.tasks, num_right, strict=True):
        accuracy, num_items = right / len(task.items), len(task.items)
        tasks[task.label] = {
            "label": task.label,
            "num_items": num_items,
            "accuracy": accuracy,
            "baseline": task.baseline,
            "centered": (accuracy - task.baseline) / (1 - task.baseline),  # 0 for random guessing
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / num_items),
        }
    errors_of_centered = [task["standard_error"] / (1 - task["baseline"]) for task in tasks.values()]
    return {
        "core_metric": sum(task["centered"] for task in tasks.values()) / len(tasks),
        "standard_error": math.hypot(*errors_of_centered) / len(tasks),
        "accuracy": sum(task["accuracy"] for task in tasks.values()) / len(tasks),
        "baseline": sum(task["baseline"] for task in tasks.values()) / len(tasks),
        "is_core": tasks.keys() == core_bundle.CORE_LABELS,  # else the mean may not be called so
        "bundle_sha256": bundle.sha256,
        "tasks": tasks,
    }


def headline(result: dict[str, Any]) -> str:
    """The mean in one line, with what it may be called and compared with."""
    score = f"{result['core_metric']:.4f} +- {result['standard_error']:.4f}"
    if result["is_core"]:
        return f"CORE {score} (22 tasks, random baselines of DCLM v1)"
    return f"tasks {score} ({len(result['tasks'])} tasks that are not CORE; guessing gives 0)"


def table(result: dict[str, Any]) -> str:
    """A line for each task: accuracy, its standard error, the baseline, the centred score, number of items."""
    head = f"{'task':<34}{'accuracy':>9}{'+-':>8}{'guessing':>10}{'centred':>9}{'items':>8}"
    line = "{label:<34}{accuracy:>9.4f}{standard_error:>8.4f}{baseline:>10.4f}{centered:>9.4f}{num_items:>8,}"
    return "\n".join([head, *(line.format(**task) for task in result["tasks"].values())])


def main() -> None:
    if not MAKE_BUNDLE:
        raise UserError("nothing to do: --make-bundle=DIR makes a bundle of tasks (scripts.base_eval evaluates on one)")
    config.check_numbers(config.snapshot(__name__), at_least_one=("ITEMS_PER_TASK",))
    shard = dataset.open_shards(paths.data_dir(DATA_DIR)).validation.path
    folder = core_bundle.own_folder(shard) if MAKE_BUNDLE == core_bundle.OWN else MAKE_BUNDLE
    counts = core_bundle.make(folder, shard, ITEMS_PER_TASK)
    print(f"{folder}, of {shard.name}:\n{', '.join(f'{count} {label}' for label, count in counts.items())}")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)

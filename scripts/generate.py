"""Generate text with a base model, which continues a prompt.

python -m scripts.generate --run-name=d4 "def main("    print the continuation as it is generated
python -m scripts.generate --run-name=d4                interactive prompt with history

Several samples are generated together, which takes little longer than one, and printed one after another.
"""

import codecs
import contextlib
import itertools
import sys
from collections.abc import Sequence

from nanotrain import checkpoint, config, errors
from nanotrain.dist import faults_as_sentences, init_distributed
from nanotrain.engine import generate_batch
from nanotrain.errors import UserError
from nanotrain.gpt import GPT
from nanotrain.tokenizer import BPETokenizer

# --- settings
RUN_NAME = ""  # folder under NANOTRAIN_DIR/runs; empty: the most recently saved run
BEST = False  # checkpoint with the best validation bits per byte instead of the newest
DEVICE = "auto"  # auto, cuda, mps or cpu
MAX_NEW_TOKENS = 200  # maximum length of a continuation, in tokens
TEMPERATURE = 0.8  # sampling temperature; 0: greedy
TOP_K = 50  # number of most likely tokens to sample from; 0: all
TOP_P = 1.0  # total probability of the most likely tokens to sample from (nucleus sampling)
NUM_SAMPLES = 1  # continuations per prompt
SEED = 1337  # seed of the first sample; sample n uses SEED + n
# ------------


@faults_as_sentences(when_full=": try a smaller --num-samples")
def main(prompts: Sequence[str] = ()) -> None:
    config.check_numbers(config.snapshot(__name__), at_least_one=("NUM_SAMPLES",))
    if not 0 < TOP_P <= 1:
        raise UserError(f"--top-p={TOP_P}: must be above 0 and at most 1 (off)")
    dist = init_distributed(DEVICE, seed=SEED)
    run_dir = checkpoint.find_run(RUN_NAME)
    model, tokenizer, meta = checkpoint.load_model(run_dir, dist.device, BEST)
    for prompt in prompts:
        answer(model, tokenizer, prompt)
    if not prompts:
        print(f"{run_dir.name}, step {meta['step']}. Type the beginning of a text.", file=sys.stderr)
        print("Ctrl-C stops a continuation, Ctrl-D exits.", file=sys.stderr)
        converse(model, tokenizer)


def converse(model: GPT, tokenizer: BPETokenizer) -> None:
    """Continue every line of standard input. In a terminal, Ctrl-C ends a continuation or a line, not the program."""
    in_terminal = sys.stdin.isatty()
    if in_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - history, editing and long lines for input()
    while True:
        try:
            prompt = input("> " if in_terminal else "")
            if prompt:
                answer(model, tokenizer, prompt)
        except EOFError:
            print(end="\n" if in_terminal else "")
            return
        except KeyboardInterrupt as interrupt:
            if not in_terminal or isinstance(interrupt, errors.Terminated):
                raise
            print()


def answer(model: GPT, tokenizer: BPETokenizer, prompt: str) -> None:
    """Print the prompt and its continuations, each character as soon as it is complete."""
    strings = tokenizer.byte_strings()
    end = prompt[-model.config.max_seq_len * max(map(len, strings)) :]  # the rest does not fit into the context
    ids = [tokenizer.bos, *tokenizer.encode(end)]
    steps = generate_batch(
        model, [ids] * NUM_SAMPLES, MAX_NEW_TOKENS, TEMPERATURE, TOP_K, TOP_P, SEED, stop=(tokenizer.bos,)
    )
    for number, steps_again in enumerate(itertools.tee(steps, NUM_SAMPLES)):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        print(prompt, end="", flush=True)
        for tokens in steps_again:
            if tokens[number] is None:
                break
            if text := decoder.decode(strings[tokens[number]]):
                print(text, end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    errors.run(lambda: main(config.override(__name__, positional=True)), for_its_output=True)

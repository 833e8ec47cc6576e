"""Talk to a base model: it continues what you write.

python -m scripts.generate --run-name=d4 "def main("    the text comes as it is made
python -m scripts.generate --run-name=d4                an interactive prompt, with history

Several samples are made together, which takes little longer than one; they are printed one after another.
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
RUN_NAME = ""  # folder under NANOTRAIN_DIR/runs; empty: the run that was saved last
BEST = False  # its checkpoint with the best validation bits per byte, not the newest
DEVICE = "auto"  # auto, cuda, mps or cpu
MAX_NEW_TOKENS = 200  # of one continuation
TEMPERATURE = 0.8  # 0: always the likeliest token
TOP_K = 50  # draw from so many of the likeliest tokens; 0: from all
TOP_P = 1.0  # and of them from the fewest that have together this probability
NUM_SAMPLES = 1  # continuations of each prompt
SEED = 1337  # of the first sample's draws; the others count on from it
# ------------


@faults_as_sentences(when_full=": try a smaller --num-samples")
def main(prompts: Sequence[str] = ()) -> None:
    config.check_numbers(config.snapshot(__name__), at_least_one=("NUM_SAMPLES",))
    if not 0 < TOP_P <= 1:
        raise UserError(f"--top-p={TOP_P}: a probability above 0 and up to 1, which draws from all")
    dist = init_distributed(DEVICE, seed=SEED)
    run_dir = checkpoint.find_run(RUN_NAME)
    model, tokenizer, meta = checkpoint.load_model(run_dir, dist.device, BEST)
    for prompt in prompts:
        answer(model, tokenizer, prompt)
    if not prompts:
        print(f"{run_dir.name}, step {meta['step']}. Write the beginning of a text.", file=sys.stderr)
        print("Ctrl-C ends what it writes, Ctrl-D the program.", file=sys.stderr)
        converse(model, tokenizer)


def converse(model: GPT, tokenizer: BPETokenizer) -> None:
    """Answer every line of standard input. In a terminal, Ctrl-C ends a text or a line, and not the program."""
    in_terminal = sys.stdin.isatty()
    if in_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history, line editing, and lines of any length
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
    """Print the prompt and its continuations: every character as soon as its last byte is there."""
    strings = tokenizer.byte_strings()
    end = prompt[-model.config.max_seq_len * max(map(len, strings)) :]  # what is before it would not be read
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

"""Talk to a base model: it continues what you write.

python -m scripts.generate --run-name=d4 "def main("
python -m scripts.generate --run-name=d4                 an interactive prompt
"""

import sys

from nanotrain import checkpoint, config, errors, runtime
from nanotrain.engine import generate
from nanotrain.errors import UserError

# --- settings
RUN_NAME = ""  # folder under NANOTRAIN_DIR/runs; empty: the run that was saved last
BEST = False  # its checkpoint with the best validation bits per byte, not the newest
DEVICE = "auto"  # auto, cuda, mps or cpu
MAX_NEW_TOKENS = 200  # of one continuation
TEMPERATURE = 0.8  # 0: always the likeliest token
TOP_K = 50  # draw from so many of the likeliest tokens; 0: from all
NUM_SAMPLES = 1  # continuations of each prompt
SEED = 1337  # of the draws
# ------------


def main(prompts=()):
    if TEMPERATURE < 0 or TOP_K < 0 or MAX_NEW_TOKENS < 0 or not 0 <= SEED < 2**63:
        raise UserError("--temperature, --top-k, --max-new-tokens and --seed must not be negative, the seed below 2^63")
    rt = runtime.start(DEVICE, seed=SEED)
    run_dir = checkpoint.find_run(RUN_NAME)
    model, tokenizer, meta = checkpoint.load_model(run_dir, rt.device, BEST)
    for prompt in prompts:
        answer(model, tokenizer, prompt)
    if not prompts:
        print(
            f"{run_dir.name}, step {meta['step']}. Write the beginning of a text; an empty line ends.", file=sys.stderr
        )
        for prompt in ask():
            answer(model, tokenizer, prompt)


def ask():
    """Yield what the user types, up to an empty line or the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() a history and line editing
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not prompt:
            return
        yield prompt


def answer(model, tokenizer, prompt):
    """Print the prompt and its continuations as they come."""
    for number in range(NUM_SAMPLES):
        print(prompt, end="", flush=True)
        tokens, shown = [], 0
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        try:
            for token in generate(model, ids, MAX_NEW_TOKENS, TEMPERATURE, TOP_K, SEED + number, stop=(tokenizer.bos,)):
                tokens.append(token)
                text = tokenizer.decode(tokens)
                if not text.endswith("\ufffd"):  # else the rest of a character is still to come
                    print(text[shown:], end="", flush=True)
                    shown = len(text)
            print(tokenizer.decode(tokens)[shown:])
        except KeyboardInterrupt:  # ends this text, not the program
            print()


if __name__ == "__main__":
    arguments = []
    errors.run(lambda: arguments.extend(config.override(globals(), positional=True)), lambda: main(arguments))

"""Export a trained model to the Hugging Face format: a folder that `transformers` loads.

    python -m scripts.export_hf --run-name=d4 --out=DIR

    AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

A model trained with --plain needs no trust_remote_code: it is transformers' own NanoChatForCausalLM. The folder is
loaded back and its logits are compared before it gets its name. It needs transformers: pip install -e '.[export]'
"""

import json
import shutil
import tempfile
from pathlib import Path

from nanotrain import checkpoint, config, errors
from nanotrain.errors import UserError
from nanotrain.huggingface import export

# --- settings
RUN_NAME = ""  # folder under NANOTRAIN_DIR/runs; empty: the run that was saved last
BEST = False  # its checkpoint with the best validation bits per byte, not the newest
STEP = 0  # its checkpoint after so many steps; 0: the newest
OUT = ""  # folder to write, which must not exist yet or be empty
# ------------

LICENCE = Path(__file__).parent.parent / "LICENSE"


def main() -> None:
    if not OUT:
        raise UserError("where to? give a folder, as in --out=exported")
    out = Path(OUT).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={OUT} exists and is not an empty folder: choose another, or remove it")
    export.require_transformers()
    run_dir = checkpoint.find_run(RUN_NAME)
    model, tokenizer, meta = checkpoint.load_model(run_dir, best=BEST, step=STEP)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        export.write(model, tokenizer, folder)
        shutil.copyfile(LICENCE, folder / "LICENSE")
        card = export.model_card(run_dir.name, model, meta, evaluation_of(run_dir, meta["step"]))
        (folder / "README.md").write_text(card, encoding="utf-8")
        difference = export.check(model, tokenizer, folder)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    kind = (
        "transformers' own NanoChatForCausalLM" if model.config.plain else "with its own code (trust_remote_code=True)"
    )
    print(f"{out}: step {meta['step']} of {run_dir.name}, {kind}, logits equal to {difference:.1g}")


def evaluation_of(run_dir: Path, step: int) -> dict:
    """What scripts.base_eval wrote of this checkpoint, or {}."""
    path = run_dir / "evaluation.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return result if result.get("step") == step else {}


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)

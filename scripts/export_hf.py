"""Export a trained model to the Hugging Face format: a folder that `transformers` loads.

    python -m scripts.export_hf --run-name=d4 --out=DIR

    AutoTokenizer.from_pretrained(DIR, trust_remote_code=False)
    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

A model trained with --plain needs no trust_remote_code: it becomes transformers' own NanoChatForCausalLM. The export is
loaded and its logits are compared before the folder appears. Needs transformers: pip install -e '.[export]'
"""

import json
import shutil
from pathlib import Path

from nanotrain import checkpoint, config, errors, files, paths
from nanotrain.errors import UserError
from nanotrain.huggingface import export

# --- settings
RUN_NAME = ""  # folder under NANOTRAIN_DIR/runs; empty: the most recently saved run
BEST = False  # checkpoint with the best validation bits per byte instead of the newest
STEP = 0  # step of the checkpoint; 0: the newest
OUT = ""  # output folder, new or empty
# ------------

LICENCE = Path(__file__).parent.parent / "LICENSE"


def main() -> None:
    if not OUT:
        raise UserError("no output folder: give one, as in --out=exported")
    out = paths.absolute(OUT)
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"transformers cannot be imported ({error}): pip install -e '.[export]'") from None
    with files.new_folder(out) as folder:
        run_dir = checkpoint.find_run(RUN_NAME)
        model, tokenizer, meta = checkpoint.load_model(run_dir, best=BEST, step=STEP)
        export.write(model, tokenizer, folder)
        shutil.copyfile(LICENCE, folder / "LICENSE")
        path = run_dir / "evaluation.json"
        evaluation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if evaluation.get("step") != meta["step"]:
            evaluation = {}
        card = export.model_card(run_dir.name, model, meta, evaluation)
        (folder / "README.md").write_text(card, encoding="utf-8")
        difference = export.check(model, tokenizer, folder)
    kind = "transformers' own NanoChatForCausalLM" if model.config.plain else "its own code (trust_remote_code=True)"
    print(f"{out}: step {meta['step']} of {run_dir.name}, {kind}, logits equal to within {difference:.1g}")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)

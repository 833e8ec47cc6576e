"""nanotrain: from-scratch GPT pretraining. Raw parquet text in, an evaluated base model out."""

import sys
from importlib.abc import MetaPathFinder

MOVED = {
    "nanotrain.runtime": "nanotrain.dist and nanotrain.hardware",
    "nanotrain.schedule": "nanotrain.recipe",
    "nanotrain.scaling": "nanotrain.recipe",
    "nanotrain.memory": "nanotrain.recipe",
    "nanotrain.spectral": "nanotrain.bigram_init",
    "nanotrain.resume": "nanotrain.checkpoint",
    "nanotrain.tracker": "nanotrain.metrics",
    "nanotrain.report_data": "nanotrain.report",
    "nanotrain.report_page": "nanotrain.report",
    "nanotrain.report_pictures": "nanotrain.report",
    "nanotrain.hf": "nanotrain.huggingface.export",
    "nanotrain.wandb_run": "nanotrain.metrics",
}


class _MovedModules(MetaPathFinder):
    """Asked last for a module that nobody else finds: an old name gets an error with the new one."""

    def find_spec(self, name, path=None, target=None):
        if name in MOVED:
            raise ImportError(f"{name} is {MOVED[name]} now", name=name)


sys.meta_path.append(_MovedModules())

"""What holds for the source as a whole: imports, side effects, settings and their flags.

What a linter can see is in pyproject.toml: no pickle, no relative imports, nothing that imports a script.
"""

import ast
import importlib
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

from nanotrain import config
from nanotrain.recipe import Recipe

PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("nanotrain", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.stem.endswith("_nanotrain")
}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
WITH_SETTINGS = [name for name, source in SOURCES.items() if re.search("^# --- ", source, re.MULTILINE)]


def imported(tree):
    """Every module that a source imports, also inside functions; `from nanotrain import x` counts as nanotrain.x."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & PATHS.keys()) or {node.module}
    return found


def test_the_library_has_no_import_cycle():
    graph = {name: imported(tree) & TREES.keys() - {name} for name, tree in TREES.items()}
    assert "nanotrain.errors" in graph["nanotrain.config"]
    while graph:
        leaves = {name for name, needed in graph.items() if not needed & graph.keys()}
        assert leaves, f"each of these needs another: {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in leaves}


def test_the_files_of_an_exported_folder_need_nothing_of_nanotrain():
    for path in (ROOT / "nanotrain").rglob("*_nanotrain.py"):
        tops = {name.partition(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
        assert tops <= {"math", "torch", "transformers", "configuration_nanotrain"}


IMPORT_PROGRAM = """
import importlib, json, os, signal, sys, threading
import numpy, pyarrow.parquet, requests, safetensors.torch, tokenizers, torch, torch.distributed, tqdm, wandb
import torch.optim, torch.nn.parallel

def state():
    return [torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().tolist(), dict(os.environ),
            signal.getsignal(signal.SIGTERM), sys.excepthook, sys.stdout, threading.active_count(), os.getcwd()]

def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        done.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "socket.connect"):
        done.append(event)

before, done = state(), []
sys.addaudithook(watch)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert (state(), done) == (before, []), done
"""


def test_importing_any_module_has_no_side_effect(tmp_path, base_dir):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    environment |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # no bait taken
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_PROGRAM, *PATHS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert not base_dir.exists()


def settings(name):
    return config.settings(vars(importlib.import_module(name)))


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_every_setting_is_used(name):
    users = SOURCES[name]
    if name == "scripts.base_train":
        users += "".join(SOURCES[f"nanotrain.{part}"] for part in ("run_plan", "checkpoint", "evals"))
    fields = [field.upper() for field in Recipe.__dataclass_fields__]
    used = re.findall(r"\b[A-Z][A-Z0-9_]+\b(?! = )", re.sub("#.*", "", users)) + fields
    assert sorted(settings(name).keys() - set(used)) == []


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_the_help_fits_a_terminal(name):
    assert max(map(len, config._help(vars(importlib.import_module(name))).splitlines())) <= 80


def test_no_flag_looks_like_an_option_of_torchrun():
    """torchrun takes a prefix of one of its options for that option."""
    flags = {config.flag_of(setting) for name in WITH_SETTINGS for setting in settings(name)}
    options = {option for action in get_args_parser()._actions for option in action.option_strings if option[1] == "-"}
    assert {"--run-name", "--depth"} <= flags
    assert [(flag, option) for flag in flags for option in options if option.startswith(flag)] == []

"""What holds for the source as a whole: imports, side effects, the environment, settings and their flags.

What a linter can see is in pyproject.toml: no pickle, no relative imports, nothing that imports a script.
"""

import ast
import importlib
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

import nanotrain
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
READ_THE_ENVIRONMENT = {
    "nanotrain.dataset",
    "nanotrain.dist",
    "nanotrain.errors",
    "nanotrain.hardware",
    "nanotrain.paths",
    "scripts.base_train",
}


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


# ---- imports ----


@pytest.mark.parametrize("name", nanotrain.MOVED)
def test_a_module_that_moved_is_an_error_with_its_new_name(name):
    successors = nanotrain.MOVED[name].split(" and ")
    assert all(importlib.util.find_spec(successor) for successor in successors)
    with pytest.raises(ImportError, match=f"{name} is {successors[0]}"):
        importlib.import_module(name)


def test_the_library_has_no_import_cycle():
    graph = {name: imported(tree) & TREES.keys() - {name} for name, tree in TREES.items()}
    assert "nanotrain.errors" in graph["nanotrain.config"]
    while graph:
        leaves = {name for name, needed in graph.items() if not needed & graph.keys()}
        assert leaves, f"each of these needs another: {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in leaves}


def test_everything_imported_is_declared():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.match(r"[\w-]+", package)[0].replace("pyyaml", "yaml") for package in packages}
    tops = {module.partition(".")[0] for tree in TREES.values() for module in imported(tree)}
    assert sorted(tops - declared - sys.stdlib_module_names - {"nanotrain"}) == []


@pytest.mark.parametrize("path", sorted((ROOT / "nanotrain").rglob("*_nanotrain.py")), ids=lambda path: path.name)
def test_the_files_of_an_exported_folder_need_nothing_of_nanotrain(path):
    beside = {"configuration_nanotrain"}
    tops = {name.partition(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
    assert tops <= {"math", "torch", "transformers"} | beside


IMPORT_PROGRAM = """
import importlib, json, os, signal, sys, threading
import numpy, pyarrow.parquet, requests, safetensors.torch, tokenizers, torch, torch.distributed, tqdm, wandb
import torch.optim, torch.nn.parallel

def state():
    return {
        "torch": [str(function()) for function in (
            torch.get_default_dtype, torch.get_default_device, torch.get_num_threads, torch.is_grad_enabled,
            torch.are_deterministic_algorithms_enabled, torch.get_float32_matmul_precision, torch.initial_seed,
            torch.distributed.is_initialized)] + torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "hooks": [str(sys.excepthook), str(sys.stdout), str(sys.stderr)],
        "threads": threading.active_count(),
        "folder": os.getcwd(),
    }

def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        done.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "socket.connect"):
        done.append(event)

before, done = state(), []
sys.addaudithook(watch)
for name in sys.argv[1:]:
    importlib.import_module(name)
after = state()
print(json.dumps([[name for name in before if before[name] != after[name]], done]))
"""


def test_importing_any_module_has_no_side_effect(tmp_path, base_dir):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    environment |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # no bait taken
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_PROGRAM, *PATHS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [[], []]
    assert not base_dir.exists()


def test_the_environment_is_read_in_few_places():
    reading = re.compile(r"\bos\.environ|getenv|from os import")
    assert {name for name, source in SOURCES.items() if reading.search(source)} <= READ_THE_ENVIRONMENT


# ---- settings ----


def constants(name):
    """{NAME: its line} of the assignments between the first heading of a module and its line of dashes."""
    lines = SOURCES[name].splitlines()
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("# --- "))
    last = next(number for number, line in enumerate(lines, 1) if number > first and re.fullmatch("# -{6,}", line))
    nodes = [node for node in TREES[name].body if isinstance(node, ast.Assign) and first < node.lineno < last]
    return {node.targets[0].id: lines[node.end_lineno - 1] for node in nodes}


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_settings_are_all_constants_of_the_block_each_with_a_comment(name):
    found = constants(name)
    assert list(config.settings(vars(importlib.import_module(name)))) == list(found)
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]* = .+  # \S.{5,}", line) for line in found.values()), found


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_every_setting_is_used(name):
    users = [TREES[name]]
    used = set()
    if name == "scripts.base_train":
        users += [TREES["nanotrain.run_plan"], TREES["nanotrain.checkpoint"]]
        used |= {field.upper() for field in Recipe.__dataclass_fields__}
    for node in (node for tree in users for node in ast.walk(tree)):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            used.add(node.id if isinstance(node, ast.Name) else node.attr)  # the latter of `config.snapshot`
    assert sorted(constants(name).keys() - used) == []


def test_no_flag_looks_like_an_option_of_torchrun():
    """torchrun takes a prefix of one of its options for that option."""
    flags = {config.flag_of(setting) for name in WITH_SETTINGS for setting in constants(name)}
    options = {option for action in get_args_parser()._actions for option in action.option_strings if option[1] == "-"}
    assert {"--run-name", "--depth"} <= flags
    assert [(flag, option) for flag in flags for option in options if option.startswith(flag)] == []
    given = [*flags, *(flag + "=1" for flag in flags)]
    parsed = get_args_parser().parse_args(["--standalone", "--nproc_per_node=8", "-m", "scripts.base_train", *given])
    assert parsed.training_script_args == given


def test_a_setting_of_several_scripts_has_one_type():
    types = {}
    for name in WITH_SETTINGS:
        for setting, value in config.settings(vars(importlib.import_module(name))).items():
            types.setdefault(setting, set()).add(type(value))
    assert {setting: kinds for setting, kinds in types.items() if len(kinds) > 1} == {}

"""What holds for the source as a whole: imports, side effects, forbidden calls, settings and their flags."""

import ast
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import nanotrain
from nanotrain import config
from nanotrain.recipe import Recipe

ROOT = Path(__file__).parent.parent
LIBRARY = sorted([*(ROOT / "nanotrain").glob("*.py"), ROOT / "nanotrain" / "huggingface" / "export.py"])
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
NAMES = {
    path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in LIBRARY + SCRIPTS
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in NAMES.items()}
WITH_SETTINGS = ["nanotrain.core_eval", "nanotrain.dataset", "nanotrain.report", *(NAMES[path] for path in SCRIPTS)]

# What may be read from the environment, and where; dist.py, which finds this process's place, may read anything.
ENVIRONMENT = {
    "nanotrain.paths": {"NANOTRAIN_DIR"},
    "nanotrain.errors": {"RANK", "WORLD_SIZE"},
    "nanotrain.hardware": {
        "RANK",
        "LOCAL_WORLD_SIZE",
        "CUBLAS_WORKSPACE_CONFIG",
        "TOKENIZERS_PARALLELISM",
        "TORCHINDUCTOR_CACHE_DIR",
        "KINETO_LOG_LEVEL",
    },
    "nanotrain.dataset": {"HF_ENDPOINT", "HF_TOKEN"},
    "scripts.base_train": {"RANK"},
}


def imported(tree):
    """Every module that a source imports, also inside functions; `from nanotrain import x` counts as nanotrain.x."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & set(NAMES.values())) or {node.module}
    return found


def dotted(node):
    """`a.b.c` of an attribute or a name, or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return None


# ---- imports ----


@pytest.mark.parametrize("name", nanotrain.MOVED)
def test_a_module_that_moved_is_an_error_with_its_new_name(name):
    successors = nanotrain.MOVED[name].split(" and ")
    for successor in successors:
        assert importlib.util.find_spec(successor)
    with pytest.raises(ImportError, match=f"{name} is {successors[0]}"):
        importlib.import_module(name)
    done = subprocess.run([sys.executable, "-m", name], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, successors[0] in done.stderr) == (1, True)


MODULES = {"pyyaml": "yaml"}  # of the packages that are called otherwise


def declared_modules():
    """The modules of the packages in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]
    optional = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.DOTALL | re.MULTILINE)[1]
    names = {re.match(r"[\w-]+", quoted)[0] for quoted in re.findall(r'"([^"]+)"', required + optional)}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize("name", TREES)
def test_everything_imported_is_the_library_the_standard_library_or_declared(name):
    packages = declared_modules()
    assert {"torch", "pyarrow", "tokenizers"} <= packages
    tops = {module.partition(".")[0] for module in imported(TREES[name])}
    assert tops <= packages | set(sys.stdlib_module_names) | {"nanotrain"}


def test_every_declared_dependency_is_imported_somewhere():
    tops = {module.partition(".")[0] for tree in TREES.values() for module in imported(tree)}
    tools = {"pytest", "pytest_xdist", "ruff", "accelerate", "peft", "lm_eval"}  # run from outside, or by dev/ alone
    assert declared_modules() - tools <= tops


def imported_at_once(tree):
    """The packages that importing a source imports."""
    return {module.partition(".")[0] for module in imported(ast.Module([n for n in tree.body if is_import(n)], []))}


def is_import(node):
    return isinstance(node, (ast.Import, ast.ImportFrom))


@pytest.mark.parametrize("name", TREES)
def test_nothing_needs_transformers_before_it_is_asked_to_export(name):
    assert "transformers" not in imported_at_once(TREES[name])
    assert imported_at_once(ast.parse("import transformers.utils")) == {"transformers"}


@pytest.mark.parametrize("path", sorted((ROOT / "nanotrain" / "huggingface").glob("*_nanotrain.py")))
def test_the_files_of_an_exported_folder_stand_alone(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if is_import(node)]
    beside = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
    assert beside <= {"configuration_nanotrain"}
    assert imported(ast.Module([node for node in nodes if not getattr(node, "level", 0)], [])) <= {
        "math", "torch", "torch.nn.functional", "transformers", "transformers.cache_utils", "transformers.generation",
        "transformers.modeling_layers", "transformers.modeling_outputs",
    }  # fmt: skip


def test_the_library_has_no_import_cycle():
    graph = {name: imported(tree) & set(TREES) - {name} for name, tree in TREES.items()}
    assert "nanotrain.errors" in graph["nanotrain.config"]
    while graph:
        leaves = {name for name, needed in graph.items() if not needed & graph.keys()}
        assert leaves, f"each of these needs another: {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in leaves}


@pytest.mark.parametrize("name", TREES)
def test_nothing_imports_a_script(name):
    assert not [module for module in imported(TREES[name]) if module.partition(".")[0] == "scripts"]


IMPORT_PROGRAM = """
import importlib, json, os, signal, sys, threading
import numpy, pyarrow.parquet, requests, safetensors.torch, tokenizers, torch, torch.distributed, tqdm, wandb
import torch.optim, torch.nn.parallel

def defaults():
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filling": torch.utils.deterministic.fill_uninitialized_memory,
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "benchmark": torch.backends.cudnn.benchmark,
        "gradients": torch.is_grad_enabled(),
        "seed": torch.initial_seed(),
        "random": torch.get_rng_state().tolist(),
        "group": torch.distributed.is_initialized(),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "hooks": [str(sys.excepthook), str(sys.stdout), str(sys.stderr)],
        "threads alive": threading.active_count(),
        "folder": os.getcwd(),
    }

written = []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "socket.connect"):
        written.append(event)

before = defaults()
sys.addaudithook(watch)
for name in sys.argv[1:]:
    importlib.import_module(name)
written_by_imports = list(written)
open(os.devnull, "w").close()
after = defaults()
different = [name for name in before if before[name] != after[name]]
print(json.dumps({"different": different, "written": written_by_imports, "watched": written != written_by_imports}))
"""


def test_importing_any_module_has_no_side_effect(tmp_path, base_dir):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    environment |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # no bait taken
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_PROGRAM, *NAMES.values()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == {"different": [], "written": [], "watched": True}
    assert not base_dir.exists()


# ---- forbidden ----

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def pickling(tree):
    """Every use of a pickle in a source: torch.load, torch.save, the modules, and what numpy and pandas call theirs."""
    found = [module for module in imported(tree) if module.partition(".")[0] in UNPICKLERS]
    for node in ast.walk(tree):
        if dotted(node) in ("torch.load", "torch.save", "torch.serialization", "np.load", "numpy.load"):
            found.append(dotted(node))
        if isinstance(node, (ast.Attribute, ast.Name)) and (dotted(node) or "").rpartition(".")[2] in UNPICKLERS:
            found.append(dotted(node))
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            found += [alias.name for alias in node.names if alias.name in ("load", "save", "serialization")]
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            found.append(node.arg)
    return found


@pytest.mark.parametrize("name", TREES)
def test_nothing_is_pickled(name):
    assert pickling(TREES[name]) == []


@pytest.mark.parametrize(
    "source",
    ["torch.load(f)", "x = torch.save", "import pickle", "from torch import load", "import pickle as p", "np.load(f)",
     "torch.serialization.load(f)", "from pickle import loads", "y = a.pickle.loads(b)", "read(f, allow_pickle=True)"],
)  # fmt: skip
def test_the_pickle_check_notices(source):
    assert pickling(ast.parse(source))


def environment_variables(tree):
    """Names read from or written to the environment; "?" for a use whose name is not written out."""
    accesses = sum(dotted(node) in ("os.environ", "os.environb") for node in ast.walk(tree))
    found = set()
    for node in ast.walk(tree):
        key, where = None, None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            where, key = dotted(node.func.value), node.args[0]
        elif isinstance(node, ast.Subscript):
            where, key = dotted(node.value), node.slice
        elif isinstance(node, ast.Compare):
            where, key = dotted(node.comparators[0]), node.left
        if where == "os.environ":
            accesses -= 1
            found.add(key.value if isinstance(key, ast.Constant) else "?")
        if isinstance(node, (ast.Attribute, ast.alias)):
            name = node.attr if isinstance(node, ast.Attribute) else node.name
            if name in ("getenv", "getenvb", "putenv", "unsetenv", "expandvars"):
                found.add("?")
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found |= {"?" for alias in node.names if "environ" in alias.name}
    return found | ({"?"} if accesses else set())


@pytest.mark.parametrize("name", sorted(set(TREES) - {"nanotrain.dist"}))
def test_the_environment_is_read_in_few_places(name):
    assert environment_variables(TREES[name]) == ENVIRONMENT.get(name, set())


@pytest.mark.parametrize(
    ("source", "names"),
    [("os.environ['A']", {"A"}), ("'B' in os.environ", {"B"}), ("os.environ.setdefault('C', '1')", {"C"}),
     ("dict(os.environ)", {"?"}), ("os.getenv('D')", {"?"}), ("from os import environ", {"?"}),
     ("os.environ[x]", {"?"}), ("environment(os)", set())],
)  # fmt: skip
def test_the_environment_check_notices(source, names):
    assert environment_variables(ast.parse(source)) == names


# ---- settings ----


def settings_block(name):
    """(first, last) line of the settings of a module with that name."""
    lines = (ROOT / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("# --- "))
    last = next(number for number, line in enumerate(lines, 1) if number > first and re.fullmatch("# -{6,}", line))
    return first, last


def constants(name):
    """{NAME: line} of the assignments in the settings of a module."""
    first, last = settings_block(name)
    return {
        node.targets[0].id: node.lineno
        for node in TREES[name].body
        if isinstance(node, ast.Assign) and first < node.lineno < last
    }


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_settings_are_all_constants_of_the_block_each_with_a_comment(name):
    found = constants(name)
    assert list(config.settings(vars(importlib.import_module(name)))) == list(found)
    assert all(re.fullmatch("[A-Z][A-Z0-9_]*", constant) for constant in found)
    source = (ROOT / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    for constant, line in found.items():
        assert re.fullmatch(r"# \S.{5,}", comments.get(line, "")), constant


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_every_setting_is_used(name):
    nodes = [node for node in ast.walk(TREES[name]) if isinstance(getattr(node, "ctx", None), ast.Load)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}  # of `config.snapshot`
    if name == "scripts.base_train":
        nodes = [node for node in ast.walk(TREES["nanotrain.run_plan"]) if isinstance(node, ast.Attribute)]
        used |= {name.upper() for name in Recipe.__dataclass_fields__} | {node.attr for node in nodes}
    unused = sorted(set(constants(name)) - used)
    assert not unused, f"nobody reads {unused}: use cfg.NAME, or make it a field of recipe.Recipe"


def torchrun_options():
    return {option for action in get_args_parser()._actions for option in action.option_strings}


def test_no_flag_looks_like_an_option_of_torchrun():
    """torchrun takes a prefix of one of its options for that option."""
    flags = {config.flag_of(setting) for name in WITH_SETTINGS for setting in constants(name)}
    assert "--run-name" in flags
    options = {option for option in torchrun_options() if option.startswith("--")}
    clashes = [
        (flag, option) for flag in flags for option in options if flag.startswith(option) or option.startswith(flag)
    ]
    assert clashes == []
    assert any(option.startswith("--run") for option in options)  # which is why it is not --run


@pytest.mark.parametrize("spelling", ["{}=1", "{}"])
def test_torchrun_hands_every_flag_on(spelling):
    given = [spelling.format(config.flag_of(setting)) for setting in constants("scripts.base_train")]
    parsed = get_args_parser().parse_args(["--standalone", "--nproc_per_node=8", "-m", "scripts.base_train", *given])
    assert parsed.training_script == "scripts.base_train"
    assert parsed.training_script_args == given


def test_a_name_means_the_same_everywhere():
    """A setting that several scripts have has one type everywhere."""
    types = {}
    for name in WITH_SETTINGS:
        for setting, value in config.settings(vars(importlib.import_module(name))).items():
            types.setdefault(setting, set()).add(type(value))
    assert {setting: kinds for setting, kinds in types.items() if len(kinds) > 1} == {}

"""README.md against the files it speaks of."""

import ast
import re

from conftest import ROOT
from torch.distributed.run import get_args_parser

from nanotrain import config

README = (ROOT / "README.md").read_text(encoding="utf-8")
FOREIGN = {"--help", "--kills", "--version", "--shutdown-timeout"}  # the last is torchrun's from torch 2.13 on


def settings():
    """The flags of all modules and scripts that have settings."""
    paths = [path for folder in ("nanotrain", "scripts", "dev") for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
    names = [ast.unparse(node.targets[0]) for node in nodes if isinstance(node, ast.Assign)]
    return {config.flag_of(name) for name in names if name.isupper()}


def test_every_flag_exists():
    torchrun = {option for action in get_args_parser()._actions for option in action.option_strings}
    known = settings() | torchrun | {option.replace("_", "-") for option in torchrun} | FOREIGN
    flags = {flag.rstrip("-") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", README)}
    assert {"--run-name", "--nproc_per_node"} <= flags
    assert sorted(flags - known) == []


def test_every_link_and_picture_is_there():
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in target]
    assert len(targets) > 10
    assert [one for one in targets if one not in anchors and not (ROOT / one.partition("#")[0]).is_file()] == []

"""README.md against the files it speaks of."""

import ast
import re
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from nanotrain import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Flags of other programs: pip, pytest, Slurm, wandb, nvidia; and those that README explains where they stand.
FOREIGN = {"--help", "--kills", "--version", "--shutdown-timeout"}  # the last is torchrun's from torch 2.13 on


def wrong_line_counts(text):
    """[(files, count, as it says)] of the rows of README's tables that are not within a tenth of the files' lines."""
    wrong, seen = [], 0
    for files, said in re.findall(r"^\| ((?:`[\w/]+\.py`(?:, )?)+) \| ([\d,]+) \|", text, re.MULTILINE):
        names = re.findall(r"`([\w/]+\.py)`", files)
        paths = [name if "/" in name else f"{Path(names[0]).parent}/{name}" for name in names]
        lines = sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in paths)
        seen += len(paths)
        if not 0.9 * lines <= int(said.replace(",", "")) <= 1.1 * lines:
            wrong.append((files, lines, said))
    assert seen > 20
    return wrong


def test_the_line_counts_are_within_a_tenth():
    assert wrong_line_counts(README) == []
    row = re.search(r"^\| `nanotrain/gpt.py` \| (\d+) \|", README, re.MULTILINE)
    longer = README.replace(row[0], row[0].replace(row[1], str(int(int(row[1]) * 1.3))))
    assert [files for files, *_ in wrong_line_counts(longer)] == ["`nanotrain/gpt.py`"]


def modules_without_a_place(text):
    named = set(re.findall(r"(\w+)\.py`", text.partition("## Reading the code")[2]))
    folders = ("nanotrain", "nanotrain/report", "scripts")
    there = {path.stem for folder in folders for path in (ROOT / folder).glob("*.py")}
    return there - named - {"__init__", "__main__"}


def test_every_module_has_its_place_in_the_tables():
    assert modules_without_a_place(README) == set()
    assert modules_without_a_place(README.replace("| `nanotrain/guard.py` |", "|")) == {"guard"}


def settings():
    """The flags of all modules and scripts that have settings."""
    found = set()
    for path in sorted(ROOT.glob("nanotrain/*.py")) + sorted(ROOT.glob("scripts/*.py")) + sorted(ROOT.glob("dev/*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
                found.add(config.flag_of(node.targets[0].id))
    return found


def unknown_flags(text):
    torchrun = {option for action in get_args_parser()._actions for option in action.option_strings}
    known = settings() | torchrun | {option.replace("_", "-") for option in torchrun} | FOREIGN
    return sorted({flag.rstrip("-") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)} - known)


def test_every_flag_exists():
    assert unknown_flags(README) == []
    assert unknown_flags(README.replace("--eval-every", "--evaluate-every")) == ["--evaluate-every"]


def missing_targets(text):
    """Links in README to a heading or a file that is not there."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert len(targets) > 10
    return [target for target in targets if target not in anchors and not (ROOT / target.partition("#")[0]).is_file()]


def test_every_link_leads_somewhere():
    assert missing_targets(README) == []
    assert missing_targets(README.replace("## The dial", "## The wheel")) == ["#the-dial"]


@pytest.mark.parametrize("path", sorted((ROOT / "dev" / "pictures").glob("*.png")), ids=lambda path: path.name)
def test_the_pictures_are_small_and_used(path):
    assert f"(dev/pictures/{path.name})" in README
    assert path.stat().st_size < 150_000

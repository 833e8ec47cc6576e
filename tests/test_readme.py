"""README.md and docs/ against the files they speak of."""

import re

from conftest import ROOT
from torch.distributed.run import get_args_parser

from nanotrain import config

PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("[dns]*/**/*.py"))
FOREIGN = """--help --kills --shutdown-timeout --project --batch_size --include_path --output_path --model_args
--log_samples --nodes --ntasks-per-node --gpus-per-node --cpus-per-task --time --signal --requeue --open-mode"""


def test_every_flag_and_program_exists():
    torchrun = {option for action in get_args_parser()._actions for option in action.option_strings}
    known = torchrun | {option.replace("_", "-") for option in torchrun} | {*FOREIGN.split()}
    known |= set(map(config.flag_of, re.findall("^([A-Z][A-Z0-9_]*) = ", SOURCES, re.MULTILINE)))
    text = "\n".join(PAGES.values())
    flags = {flag.rstrip("-") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert {"--run-name", "--nproc_per_node"} <= flags
    assert sorted(flags - known) == []
    for name in re.findall(r"(?:-m|python|bash) ((?:dev|tests|scripts|nanotrain)[/.][\w./]+)", text):
        path = ROOT / (name if "/" in name else name.replace(".", "/"))
        assert path.exists() or path.with_suffix(".py").exists(), name


def test_every_link_and_picture_is_there():
    headings = {path: re.findall(r"^#+ (.+)$", text, re.MULTILINE) for path, text in PAGES.items()}
    links = [(path, link) for path, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(links) > 30
    for path, file, anchor in ((path, *link.partition("#")[::2]) for path, link in links if "://" not in link):
        target = (path.parent / file).resolve() if file else path
        anchors = ["", *(re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings.get(target, ()))]
        assert (target.is_file(), anchor in anchors) == (True, True), f"{path.name}: {file}#{anchor}"


def test_every_message_of_troubleshooting_is_one_of_ours():
    symptoms = " ".join(re.findall(r"\*\*(.+?)\*\*", PAGES[ROOT / "docs" / "troubleshooting.md"]))
    quoted, said = re.findall(r"`(.+?)`", symptoms), re.sub(r"\s+", " ", SOURCES)
    assert len(quoted) > 10
    assert [text for text in quoted if not all(part.strip() in said for part in text.split("..."))] == []

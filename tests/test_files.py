"""Files and folders that are there whole or not at all."""

import os
import time

import pytest

from nanotrain import files
from nanotrain.errors import UserError


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"

    def write(text, error=None):
        with files.atomic_file(path) as temporary:
            temporary.write_text(text)
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write("half", KeyboardInterrupt())
    assert os.listdir(path.parent) == []
    write("first")
    with pytest.raises(ValueError, match="disk"):
        write("sec", ValueError("disk"))
    assert (os.listdir(path.parent), path.read_text()) == (["file"], "first")
    write("third")
    assert (os.listdir(path.parent), path.read_text()) == (["file"], "third")


def test_what_comes_while_a_folder_is_filled_is_not_replaced_either(tmp_path):
    folder = tmp_path / "mine"

    def fill():
        with files.new_folder(folder):
            folder.mkdir()
            (folder / "letter").write_text("dear")

    with pytest.raises(UserError, match="would be lost"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (folder / "letter").read_text() == "dear"


def test_only_what_a_killed_process_left_of_this_very_folder_is_removed(tmp_path):
    old = time.time() - 2 * files.STALE_SECONDS
    number = "0" * 32
    names = {
        f".tmp-mine-{number}": False, f".old-mine-{number}": False, f".tmp-wiki-mine-{number}": True,
        ".vscode-mine-insiders": True, f".tmp-mine-{number}0": True, f".tmp-mine-{'1' * 32}": True,
    }  # fmt: skip
    for name in names:
        (tmp_path / name / "buckets").mkdir(parents=True)
        (tmp_path / name / "buckets" / "00").write_text("x")
        for path in (tmp_path / name / "buckets" / "00", tmp_path / name / "buckets", tmp_path / name):
            os.utime(path, (old, old))
    (tmp_path / f".tmp-mine-{'1' * 32}" / "buckets" / "00").write_text("still written to")
    os.utime(tmp_path / f".tmp-mine-{'1' * 32}", (old, old))
    with files.new_folder(tmp_path / "mine"):
        pass
    assert {name: (tmp_path / name).exists() for name in names} == names

"""Files and folders that are there whole or not at all."""

import os

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

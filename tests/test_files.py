"""Files and folders that are there whole or not at all."""

import errno
import os
from pathlib import Path

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


def test_a_mount_point_is_filled_in_place_and_refused_before_the_work_where_it_is_not_empty(tmp_path, monkeypatch):
    mount, rename = tmp_path / "mount", Path.rename

    def rename_nothing_mounted(path, other):
        if path == mount:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", rename_nothing_mounted)
    mount.mkdir()
    with files.new_folder(mount) as temporary:
        (temporary / "file").write_text("new")
    assert [path.name for path in mount.iterdir()] == ["file"]
    with pytest.raises(UserError, match="would be lost"), files.new_folder(mount, check=lambda folder: None):
        pytest.fail("worked in vain")


def test_links_stay_and_what_they_point_to_is_replaced(tmp_path):
    (tmp_path / "to_file").symlink_to("target/file")
    with files.atomic_file(tmp_path / "to_file") as temporary:
        temporary.write_text("old")
    (tmp_path / "to_folder").symlink_to("target")
    with files.new_folder(tmp_path / "to_folder", check=lambda folder: None) as temporary:
        (temporary / "file").write_text("new")
    assert (tmp_path / "to_folder").is_symlink()
    assert (tmp_path / "to_file").is_symlink()
    assert (tmp_path / "to_file").read_text() == "new"


def test_an_error_of_an_open_file_names_it(tmp_path):
    with pytest.raises(OSError, match="file") as caught, files.atomic_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError, match="folder"), files.new_folder(tmp_path / "folder"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_link_to_itself_is_an_error_of_the_system(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"), files.new_folder(tmp_path / "loop" / "folder"):
        pass

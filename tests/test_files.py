"""A result file is replaced whole, or stays."""

import os
import stat

import pytest

from htv.tools.files import replace_text, replacing


def test_what_is_written_takes_the_place(tmp_path):
    path = tmp_path / "table.json"
    replace_text(path, "one\n")
    path.chmod(0o640)
    replace_text(path, "two ±\n")
    assert path.read_text(encoding="utf-8") == "two ±\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as part:
        assert part.suffix == ".json" and part.parent == tmp_path
        part.write_text("three")
        assert path.read_text(encoding="utf-8") == "two ±\n"
    assert path.read_text() == "three"


@pytest.mark.parametrize("at", ["fsync", "replace", "the block"])
def test_what_was_there_stays_where_anything_fails(tmp_path, monkeypatch, at):
    path = tmp_path / "table.json"
    path.write_text("old")

    def fails(*_):
        raise OSError(28, "No space left on device")

    if at == "fsync":
        monkeypatch.setattr(os, "fsync", fails)
    if at == "replace":
        monkeypatch.setattr(type(path), "replace", fails)
    with pytest.raises(OSError, match="No space"), replacing(path) as part:
        part.write_text("new")
        if at == "the block":
            fails()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_nothing_is_replaced_before_it_is_on_the_disk(tmp_path, monkeypatch):
    path, seen, fsync = tmp_path / "table.json", [], os.fsync
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda file: (seen.append(path.read_text()), fsync(file)))
    replace_text(path, "new")
    assert seen == ["old", "new"]  # the file's own, then its folder's


def test_links_stay_links(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    replace_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="needs /dev/null")
def test_what_is_no_file_is_written_to():
    replace_text("/dev/null", "nothing")
    assert not os.path.isfile("/dev/null")

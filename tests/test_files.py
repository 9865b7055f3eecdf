"""A file is there whole or not at all."""

from pathlib import Path

import pytest

from l0fast.files import whole_file, write_whole


def test_a_reader_finds_the_old_file_until_the_new_one_is_whole(tmp_path: Path):
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_can_not_be_written_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "a.json"
    write_whole(path, b"old")

    def write_half(partial: Path) -> None:
        partial.write_bytes(b"ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"), whole_file(path) as partial:
        write_half(partial)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_where_it_can_not_lie_nothing_is_left_beside(tmp_path: Path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "a.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

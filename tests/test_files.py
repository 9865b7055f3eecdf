"""A file is there whole or not at all, and one process writes it."""

import errno
import fcntl
from pathlib import Path

import pytest

from l0fast.files import lock, whole_file, write_whole


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


def test_a_file_is_one_process_s_until_it_is_closed(tmp_path: Path):
    with (tmp_path / "a").open("a") as ours, (tmp_path / "a").open("a") as theirs:
        assert lock(ours)
        with pytest.raises(BlockingIOError):
            lock(theirs)
        ours.close()
        assert lock(theirs)


@pytest.mark.parametrize(("number", "there_are_none"), [
    (errno.ENOSYS, True), (errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EBADF, False),
])  # fmt: skip
def test_a_file_system_without_locks_is_told_from_one_that_fails(
    tmp_path: Path, monkeypatch, number: int, there_are_none: bool
):
    def refuses(file, operation):
        raise OSError(number, "as Lustre and NFS do")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with (tmp_path / "a").open("a") as file:
        if there_are_none:
            assert not lock(file)
        else:
            with pytest.raises(OSError, match="as Lustre"):
                lock(file)

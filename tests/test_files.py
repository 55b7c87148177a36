"""Files are written whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from disk_support import file_size_limit

from attnbench.errors import UserError
from attnbench.files import make_folder, replacing, write


def test_an_older_file_survives_where_the_new_one_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write(path, "good")
    with file_size_limit(1000), pytest.raises(UserError, match=r"cannot write .*page\.html: File too large; buy a disk"):
        write(path, "x" * 10_000, remedy="buy a disk")
    assert path.read_text() == "good"
    write(path, "better")
    assert path.read_text() == "better"
    assert list(tmp_path.iterdir()) == [path]


def interrupted(path: Path) -> None:
    """Ctrl-C while a file is half written."""
    path.write_text("half")
    raise KeyboardInterrupt


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt), replacing(path) as fresh:
        interrupted(fresh)
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("kept")
    write(tmp_path / "link", "told")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "kept").read_text() == "told"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, a file that is always full")
def test_a_device_is_written_to_and_never_replaced() -> None:
    write(Path("/dev/null"), "nothing")
    with pytest.raises(UserError, match="No space left on device"):
        write(Path("/dev/full"), "nothing")
    assert Path("/dev/null").is_char_device()
    assert Path("/dev/full").is_char_device()


def test_a_file_where_a_folder_belongs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()
    for path in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"):
        with pytest.raises(UserError, match="/a is a file: name a folder"):
            write(path, "")
    with pytest.raises(UserError, match="is a folder: name a file"):
        write(tmp_path, "")
    write(tmp_path / "new" / "folder" / "x", b"made")
    with pytest.raises(UserError, match=r"cannot write .*: No such file or directory"):
        write(tmp_path / "absent" / "x", "", parents=False)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match=r"cannot write to .*: Read-only file system"):
        make_folder(tmp_path / "d")

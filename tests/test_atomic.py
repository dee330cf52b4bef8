"""Files are written whole or not at all, by one function."""

import pytest
from conftest import ROOT

from part_fast.atomic import replacing


def test_the_new_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "result.json"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stays_if_the_block_raises(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def write():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_else_replaces_files():
    names = ("os.replace", "os.rename", "shutil.move", "NamedTemporaryFile", "mkstemp")
    files = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "part_fast").rglob("*.py"))
        if any(name in path.read_text() for name in names)
    ]
    assert files == ["part_fast/atomic.py"]

"""Files are written whole or not at all, by one function."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from part_fast.atomic import replacing
from part_fast.models import export_weights, resnet_small


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


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], indirect=True, ids=oct)
def test_files_are_as_readable_as_those_of_open(umask, tmp_path):
    (tmp_path / "plain").write_text("")
    expected = (tmp_path / "plain").stat().st_mode
    writers = {
        "a.json": lambda path: path.write_text("new"),
        "b.safetensors": lambda path: save_file({"a": torch.zeros(1)}, path),
        "c.pt": lambda path: torch.save({"a": torch.zeros(1)}, path),
    }
    for name, write in writers.items():
        for _ in range(2):  # a new file, and one that takes the place of another
            with replacing(tmp_path / name) as temporary:
                write(temporary)
            assert (tmp_path / name).stat().st_mode == expected, name
            (tmp_path / name).chmod(0o600)
    for name in ("weights.safetensors", "weights.pt"):
        assert export_weights(resnet_small(), tmp_path / name).stat().st_mode == expected


def test_what_a_killed_process_left_does_not_decide_who_may_read(tmp_path):
    left = tmp_path / ".result.json.tmp"
    left.write_text("half")
    left.chmod(0o600)
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "result.json") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "result.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_block_that_writes_nothing_replaces_nothing(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_nothing_else_replaces_files():
    names = ("os.replace", "os.rename", "shutil.move", "NamedTemporaryFile", "mkstemp")
    files = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "part_fast").rglob("*.py"))
        if any(name in path.read_text() for name in names)
    ]
    assert files == ["part_fast/atomic.py"]


FULL = """
import json, resource, signal, sys, torch
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from part_fast.atomic import replacing
from part_fast.models.weights_file import write_weights
from part_fast.report.files import write_csv, write_json

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error then, as on a full disk
folder, big = Path(sys.argv[1]), torch.rand(300, 300)


def torch_save(path):
    with replacing(path) as temporary:
        torch.save({"w": big}, temporary)


def safetensors(path):
    with replacing(path) as temporary:
        save_file({"w": big}, temporary)


def image(path):
    with replacing(path) as temporary:
        Image.fromarray((big * 255).byte().numpy()).save(temporary, "PNG")


writers = {
    "state.pt": torch_save,
    "w.safetensors": safetensors,
    "checked.safetensors": lambda path: write_weights(path, {"w": big}),
    "a.png": image,
    "a.json": lambda path: write_json(path, {"a": big.flatten().tolist()}),
    "a.csv": lambda path: write_csv(path, [{"a": value} for value in big.flatten().tolist()]),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
for name, write in writers.items():
    path = folder / name
    path.write_text("old")
    try:
        write(path)
    except OSError as error:
        said = str(error)
        assert str(path) in said and "\\n" not in said and ("large" in said or "full" in said), said
    else:
        raise AssertionError(name)
    assert path.read_text() == "old", name
assert sorted(path.name for path in folder.iterdir()) == sorted(writers)
"""


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    """Whoever writes: torch.save and safetensors have errors of their own, with lines of C++ and of Rust."""
    subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], check=True, cwd=ROOT)


def test_what_is_synced_is_on_the_disk_before_and_after_it_takes_its_place(tmp_path, monkeypatch):
    """A power cut cannot be had here: the calls that survive one are counted, in their order."""
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        calls.append(("synced", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append(("replaced", new.name)) or replace(old, new))
    for how in (False, True):
        with replacing(tmp_path / "state.pt", synced=how) as temporary:
            temporary.write_text("new")
    assert calls == [
        ("replaced", "state.pt"),
        ("synced", ".state.pt.tmp"),
        ("replaced", "state.pt"),
        ("synced", tmp_path.name),
    ]


def test_a_folder_that_may_not_be_written_to_is_named_by_the_file_itself(tmp_path):
    """Not by the temporary one, of which nobody knows."""
    path = tmp_path / "no folder" / "result.json"
    with pytest.raises(OSError, match=r"'.*no folder/result\.json'$"), replacing(path) as temporary:
        temporary.write_text("new")

"""Files are written whole or not at all, by one function."""

import subprocess
import sys

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

"""Reading runs no code, leaves no folder, asks no network and ends; docs/safety.md says so."""

import ast
import gzip
import json
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_fuzz_files import COLOURS, WEIGHTS, Net, batch, element, image, matrix, saved

import part_fast
from part_fast.config import TrainConfig, read_config
from part_fast.data import files
from part_fast.evaluation import accuracy, trained
from part_fast.models.checkpoints import load_weights
from part_fast.reading import read_json, read_tensors
from part_fast.report.files import write_json

SOURCES = [path for top in ("part_fast", "examples", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))]


def calls():
    """(file, dotted name, keywords) of every call in the tree."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), keywords


def test_what_could_run_code_or_leave_a_folder_is_called_nowhere_else():
    found = list(calls())
    assert [(file, words) for file, name, words in found if name == "torch.load" and file.startswith("part_fast/")] == [
        ("part_fast/reading.py", {"map_location": "'cpu'", "weights_only": "True"})
    ]
    assert {words.get("allow_pickle") for _, name, words in found if name in ("np.load", "numpy.load")} == {"False"}
    assert {words.get("filter") for _, name, words in found if name.endswith("extractall")} == {"'data'"}
    never = (
        "eval",
        "exec",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "marshal.loads",
        "shelve.open",
        "os.system",
    )
    never += ("shutil.unpack_archive", "urlopen", "urllib.request.urlopen", "urlretrieve", "requests.get", "yaml.load")
    # torch.fx's code of the network that is fused, which no file gives.
    own = ("part_fast/attack_model/fuse.py", "exec")
    assert [(file, name) for file, name, _ in found if name in never] == [own]
    for path in SOURCES:
        text = path.read_text()
        assert path.name == "files.py" or "import pickle" not in text, path
        assert not any(f"import {name}" in text for name in ("urllib", "requests", "http.client", "ftplib")), path


OFFLINE = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        raise SystemExit(f"network: {event} {arguments}")

sys.addaudithook(refuse)
from part_fast import cli
run = sys.argv[1]
flags = "--method part --epochs 1 --warmup-epochs 0 --batch-size 32 --train-size 64 --test-size 20 --steps 1"
for line in (
    f"train --out {run} {flags} --pgd-test-size 0 --device cpu",
    f"evaluate {run} --attacks natural,pgd2,mma",
    f"masks {run} --n 2 --out {run}/grid.png",
    f"export {run} --out {run}/w.pt",
    "info",
):
    assert cli.main(line.split()) == 0, line
"""


def test_nothing_asks_the_network(tmp_path):
    subprocess.run([sys.executable, "-c", OFFLINE, str(tmp_path / "run")], check=True, cwd=ROOT, capture_output=True)


def test_a_run_that_was_downloaded_for_is_not_downloaded_for_again(tmp_path, monkeypatch):
    """The folder may be another's: what its config.json says of downloads is nobody's wish here."""
    asked = []
    monkeypatch.setattr(trained, "load", lambda *arguments: asked.append(arguments) or (_ for _ in ()).throw(OSError))
    (tmp_path / "model.safetensors").write_bytes(b"")
    write_json(tmp_path / "config.json", TrainConfig(dataset="cifar10", download=True).to_json())
    for download in (False, True):
        with pytest.raises(OSError):  # noqa: PT011 - the one above
            trained.load_trained(tmp_path, download=download)
        assert asked[-1][3] is download


def quickly(call, message, seconds=5.0, mebibytes=64):
    """One line, in time and memory that do not grow with what the file announces."""
    begin = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(part_fast.UsageError, match=message) as caught:
            call()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begin < seconds
    assert most < mebibytes << 20
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def nested(depth):
    """Instructions for tuples of twice the same tuple, `depth` deep: to hash or print it takes 2**depth steps."""
    return b")" + b"".join(b"q\x01h\x01\x86" for _ in range(depth))


HOSTILE_PICKLES = {
    "64 GiB of memos": b"Nr\xff\xff\xff\xff.",
    "a key whose hash never ends": b"}" + nested(60) + b"Ns.",
    "a key of a dictionary made at once": b"(" + nested(60) + b"Nd.",
    "a shape that prints for ever": b"".join(
        (b"cnumpy.core.numeric\n_frombuffer\n(C\x01x", b"cnumpy\ndtype\n(S'u1'\ntR", nested(60), b"S'C'\ntR.")
    ),
    "a dtype that prints for ever": b"cnumpy\ndtype\n(" + nested(60) + b"tR.",
    "a state for a function": b"cnumpy.core.multiarray\n_reconstruct\n}S'__kwdefaults__'\n}sb.",
    "a state for a class": b"cnumpy\ndtype\n(N}S'__init__'\ncnumpy\nndarray\nstb.",
    "an announced terabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "an announced string": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "an extension": b"\x82\x01.",
    "a persistent id": b"Pid\n.",
    "a new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "an instance": b"(icollections\nOrderedDict\n.",
    "a builtin": b"c__builtin__\neval\n(S'1'\ntR.",
    "a name with dots": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.__mro\x93.",
    "a long name": b"c" + b"x" * 100000 + b"\ny\n.",
    "a frame that ends early": b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"N.",
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_pickles_made_to_harm_are_refused_at_once(name, tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(HOSTILE_PICKLES[name])
    quickly(lambda: files.read_cifar_pickle(path, "CIFAR-10", "labels", 10), "data_batch_1 is not a CIFAR-10 batch")
    path.write_bytes(batch(4))  # and the reader is as it was
    assert files.read_cifar_pickle(path, "CIFAR-10", "labels", 10)[1].tolist() == [3, 9]


def test_what_is_packed_is_unpacked_as_far_as_it_says(tmp_path):
    bomb = zlib.compress(bytes(1 << 25), 9)
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 4, 4) + bytes(1 << 25), 1))
    quickly(lambda: files.read_idx(path, 3), "images has .* bytes, its header")
    path.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**31, 2**31, 4))
    quickly(lambda: files.read_idx(path, 3), "which are more than")
    head = b"MATLAB 5.0".ljust(124) + b"\0\x01IM"
    path.write_bytes(head + struct.pack("<II", 15, len(bomb)) + bomb)
    quickly(lambda: files.read_mat(path, "X"), "damaged MATLAB file")
    tagged = zlib.compress(struct.pack("<II", 14, 2**32 - 8) + bytes(1 << 20))
    path.write_bytes(head + struct.pack("<II", 15, len(tagged)) + tagged)
    quickly(lambda: files.read_mat(path, "X"), "more than 2147483648")


def test_an_array_twice_in_a_mat_file_is_refused(tmp_path):
    path = tmp_path / "train_32x32.mat"
    head = b"MATLAB 5.0".ljust(124) + b"\0\x01IM"
    path.write_bytes(head + 2 * matrix(b"X", COLOURS, 9, 2))
    quickly(lambda: files.read_mat(path, "X"), "X stands there twice")
    path.write_bytes(head + element(5, b"\0" * 8) + matrix(b"X", COLOURS, 9, 2))
    quickly(lambda: files.read_mat(path, "X"), "an element of type 5 where an array stands")


def test_a_checkpoint_that_is_larger_unpacked_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N.")
        archive.writestr("archive/data/0", bytes(1 << 25))
    quickly(lambda: load_weights(Net(), path), "w.pt .*its parts are compressed")


def test_a_flip_in_the_data_of_a_checkpoint_is_found(tmp_path):
    content = bytearray(saved(WEIGHTS))
    path = tmp_path / "w.pt"
    content[content.index(WEIGHTS["conv.weight"].numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)
    quickly(lambda: load_weights(Net(), path), "w.pt .*Bad CRC-32")
    before = torch.serialization.get_crc32_options()
    try:  # files of programs that write none still load
        torch.serialization.set_crc32_options(False)
        path.write_bytes(saved(WEIGHTS))
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load_weights(Net(), path).state_dict()["conv.weight"], WEIGHTS["conv.weight"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"conv.weight": torch.full((2, 3, 1, 1), float("nan"))}, "holds NaN or infinite values"),
        ({"conv.weight": torch.ones(2, 3, 1, 1, dtype=torch.int8)}, "other kinds of numbers: conv.weight int8"),
        ({"conv.weight": torch.ones(2, 3, 1, 1).to_sparse()}, "is no array of numbers: float32, sparse_coo"),
        ({"conv.weight": torch.ones(2, 3, 1, 1, dtype=torch.complex64)}, "is no array of numbers: complex64"),
        ({"conv.weight": torch.ones(2, 3, 1, 1, device="meta")}, "is no array of numbers: .* meta"),
        ({7: torch.ones(1)}, "a key that is a int|missing"),
    ],
)
def test_weights_that_are_none_are_refused(bad, message):
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(net, WEIGHTS | bad)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_mappings_that_hold_themselves_end():
    loop = {f"part{i}": None for i in range(1000)}
    loop.update(dict.fromkeys(loop, loop))
    quickly(lambda: load_weights(Net(), loop), "does not fit|holds")


def test_images_are_read_by_what_pillow_itself_unpacks(tmp_path):
    """Pillow hands PostScript to another program, whatever the name of the file ends in."""
    path = tmp_path / "1.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 9\n%%EndComments\nshowpage\n")
    for read in (lambda: files.image_size(path), lambda: files.read_images([path], (9, 7))):
        quickly(read, "1.png is not an image that can be read: cannot identify")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 60_000])
def test_an_image_that_says_it_is_huge_is_refused_by_its_header(side, tmp_path):
    content = bytearray(image("PNG"))
    header = b"IHDR" + struct.pack(">II", side, side) + bytes(content[24:29])
    content[12:33] = header + struct.pack(">I", zlib.crc32(header))
    path = tmp_path / "1.png"
    path.write_bytes(content)
    quickly(lambda: files.image_size(path), "1.png is not an image that can be read")
    quickly(lambda: files.read_images([path], (9, 7)), "1.png is not an image that can be read")


def test_many_large_images_do_not_end_in_a_traceback(tmp_path):
    path = tmp_path / "1.png"
    Image.new("L", (8000, 8000)).save(path)

    class Many(list):
        def __len__(self):
            return 10**12

    quickly(lambda: files.read_images(Many([path]), files.image_size(path)), "do not fit in memory$")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice in one object"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": -1e999}', "-1e999 is not a finite number"),
        ('{"a": ' + "1" * 400 + "}", "is not a finite number"),
        ('{"a":' * 100000, "is not JSON that can be read"),
        ("[1]", "must hold an object, got a list"),
        ("", "is not JSON that can be read"),
    ],
)
def test_json_is_read_strictly(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    quickly(lambda: read_json(path), f"a.json .*{message}")


def test_json_with_a_mark_or_dos_lines_is_the_same(tmp_path):
    path = tmp_path / "a.json"
    for content in (b'\xef\xbb\xbf{"a": "\xc3\xa9"}', b'{\r\n"a": "\xc3\xa9"}\r\n'):
        path.write_bytes(content)
        assert read_json(path) == {"a": "é"}
    path.write_bytes('{"a": "é"}'.encode("utf-16"))
    quickly(lambda: read_json(path), "a.json is not JSON")
    quickly(lambda: read_json(tmp_path), "there is no file at")


def test_a_configuration_says_what_it_lacks(tmp_path):
    values = TrainConfig(eps=0.1).to_json()
    del values["alpha"], values["eps_low"]
    write_json(tmp_path / "config.json", values)
    with pytest.warns(UserWarning, match=r"config.json does not say eps_low \(0.027.*, alpha \(0.0078"):
        assert read_config(tmp_path).eps == 0.1
    for name, value in (("eps", "8/255"), ("epochs", 2.5), ("lr_drops", [1, None]), ("model", 3), ("augment", 1)):
        write_json(tmp_path / "config.json", TrainConfig().to_json() | {name: value})
        quickly(lambda: read_config(tmp_path), rf"config.json: {name} must be ")
    write_json(tmp_path / "config.json", TrainConfig().to_json() | {"method": "none"})
    quickly(lambda: read_config(tmp_path), "config.json: method must be one of")


def test_bools_that_are_neither_are_found(tmp_path):
    from safetensors.torch import save

    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"right": torch.tensor([True, False])})[:-2] + b"\x01\x02")
    quickly(lambda: read_tensors(path), "'right' holds bools that are neither 0 nor 1")


def test_an_evaluation_that_is_killed_keeps_what_it_has(tmp_path, monkeypatch):
    """Killed in the third attack, it has the first two, and goes on from there."""
    data = trained.load("demo", "test", None, False).subset(20)
    done = []

    def attack(net, images, name, *arguments, **how):
        if name == "pgd9" and "pgd9" not in done:
            done.append(name)
            raise KeyboardInterrupt
        done.append(name)
        return torch.arange(20) % (20 if name == "natural" else 2) == 0

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = trained.Trained(torch.nn.Identity(), TrainConfig(), data, tmp_path / "model.safetensors")
    monkeypatch.setattr(accuracy, "load_trained", lambda *arguments, **how: found)
    monkeypatch.setattr(accuracy, "is_correct", attack)
    names = ("natural", "pgd2", "pgd9")
    with pytest.raises(KeyboardInterrupt):
        accuracy.evaluate(tmp_path, names, device="cpu")
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(kept["results"]) == ["natural", "pgd2"]
    assert kept["warnings"] == ["pgd2 is above natural: " + kept["warnings"][0].partition(": ")[2]]
    assert accuracy.evaluate(tmp_path, names, device="cpu", resume=True)["results"].keys() == {*names}
    assert done == ["natural", "pgd2", "pgd9", "pgd9"]
    assert np.isfinite(json.loads((tmp_path / "evaluation.json").read_text())["results"]["pgd9"]["accuracy"])


def test_the_page_is_linked():
    assert "(docs/safety.md)" in (ROOT / "README.md").read_text()

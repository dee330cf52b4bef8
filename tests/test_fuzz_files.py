"""Every file that part_fast reads, damaged in many ways: the right result, or one line that names the file.

A corpus of tiny valid files is made here; seeded mutations of each are read. A failure prints the reader and the number
of the mutation; `mutated(NAME, NUMBER)` makes the same bytes again. The slow test draws many more.
"""

import gzip
import io
import json
import pickle
import random
import resource
import signal
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import TINY_RUN
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import part_fast
from part_fast.config import TrainConfig, read_config
from part_fast.data import fashion_mnist, files
from part_fast.data.folders import _val_annotations
from part_fast.evaluation import accuracy
from part_fast.evaluation.sweep import read_sweep
from part_fast.experiments import runs
from part_fast.models.checkpoints import load_weights
from part_fast.models.weights_file import write_weights
from part_fast.report.files import write_csv, write_json
from part_fast.training import checkpoint, run_folder
from part_fast.training.mask_history import MASKS, read_masks

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8)
PIXELS = RNG.integers(0, 256, (2, 3072), dtype=np.uint8)
COLOURS = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def matrix(name, array, kind, storage):
    flags, dims = struct.pack("<II", kind, 0), struct.pack(f"<{array.ndim}i", *array.shape)
    values = array.tobytes(order="F")
    return element(14, element(6, flags) + element(5, dims) + element(1, name) + element(storage, values))


def mat(packed):
    arrays = [matrix(b"X", COLOURS, 9, 2), matrix(b"y", np.arange(9.0).reshape(9, 1), 6, 9)]
    if packed:
        arrays = [struct.pack("<II", 15, len(z)) + z for z in map(zlib.compress, arrays)]
    return b"MATLAB 5.0".ljust(124) + b"\0\x01IM" + b"".join(arrays)


def image(kind, **how):
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, kind, **how)
    return file.getvalue()


def batch(protocol):
    return pickle.dumps({"data": PIXELS, "labels": [3, 9], "filenames": ["a.png", "b.png"]}, protocol)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)


torch.manual_seed(0)
WEIGHTS = Net().state_dict()


def saved(value, **how):
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def written(write):
    """The bytes that `write(path)` leaves."""

    def make(tmp_path):
        path = tmp_path / "made.safetensors"
        write(path)
        return path.read_bytes()

    return make


def weights_of(path):
    return load_weights(Net(), path).state_dict()


LABELS, RIGHT = torch.arange(6), torch.tensor([True, False, True, True, False, True])
SETTINGS = {"sha256": "0" * 64, "dataset": "demo", "n": 6, "eps": 8 / 255, "alpha": 2 / 255, "seed": 0}
IMAGES = {"labels": LABELS, "natural": RIGHT, "pgd20": RIGHT & RIGHT.roll(1)}


def evaluation():
    names = ("natural", "pgd20")
    checksums = {name: accuracy.images_sha256(LABELS, IMAGES[name]) for name in names}
    results = {name: {**accuracy.accuracy(IMAGES[name]), "seconds": 1.25} for name in names}
    return SETTINGS | {"results": results, "images_sha256": checksums, "environment": {}, "warnings": []}


def read_evaluation(path):
    """Reads the pair; the one that is not mutated lies beside the one that is."""
    summary, per_image = path.parent / "evaluation.json", path.parent / "evaluation_images.safetensors"
    if path != summary:
        write_json(summary, evaluation())
    if path != per_image:
        save_file(IMAGES, per_image)
    return accuracy._read_results(summary, per_image, SETTINGS, LABELS)


def stopped(path):
    """What AutoAttack leaves when it is stopped in the middle."""
    state = {"right": torch.arange(200) % 3 > 0, "done": torch.tensor([128]), "seconds": torch.tensor([7.5])}
    save_file(state | {"sha256": accuracy._checksum(*state.values())}, path)


METRICS = [
    {"epoch": e, "method": "part", "lr": 0.1, "train_loss": 2.5 / e, "train_robust": 0.125 * e, "test_natural": 0.5}
    | {"test_pgd20": None, "skipped": 0, "seconds": 12.75, "images_per_second": 1003.5}
    for e in (1, 2, 3)
]


def mask_history(path):
    tensors = {
        "images": torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4),
        "labels": torch.tensor([0, 1]),
        "epochs": torch.tensor([1, 2, 3]),
        "weights": torch.arange(96, dtype=torch.uint8).view(3, 2, 1, 4, 4),
        "eps": torch.tensor([8 / 255, 7 / 255], dtype=torch.float64),
    }
    save_file(tensors, path, {"class_names": json.dumps(["cat", "dog"])})


def swept():
    points = [{"eps": e / 255, **accuracy.accuracy(RIGHT)} for e in (0, 8)]
    return SETTINGS | {"curves": {"eps": {"points": points, "warnings": ["rises"]}}, "environment": {}}


def state():
    return {
        "version": checkpoint.VERSION,
        "config": TINY_RUN.to_json(),
        "rows": [{"epoch": 1, "train_loss": 2.5}],
        "epoch": 1,
        "processes": [{"done": 0, "rng": torch.get_rng_state()[:64]}],
        "model": WEIGHTS,
    }


def write_state(path):
    checkpoint.write_state(path.parent, {key: value for key, value in state().items() if key != "version"})
    (path.parent / checkpoint.STATE).rename(path)


def read_demo(path):
    before = fashion_mnist.DEMO_FILE
    fashion_mnist.DEMO_FILE = path
    try:
        return fashion_mnist.load_demo("test", None, False).images
    finally:
        fashion_mnist.DEMO_FILE = before


def same_json(content, value):
    """What was read is what the file says: nothing is taken for something else."""
    said = json.loads(content.decode("utf-8-sig"))
    return all(said[key] == now and type(said[key]) is type(now) for key, now in value.items())


def as_the_file_says(content, config):
    said, now = json.loads(content.decode("utf-8-sig")), config.to_json()
    missing = TrainConfig().to_json()
    return now == missing | said


def same_pixels(content, value):
    """The header is as it was; the values are those of the file."""
    return value.tobytes() == content[16:] and value.shape == GRAY.shape


def same_records(content, value):
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return np.array_equal(value[0], records[:, 1:]) and np.array_equal(value[1], records[:, 0])


def same_batch(content, value):
    """What Python itself reads of it, where that names nothing but numpy."""
    names = {b"numpy.core.multiarray": b"numpy._core.multiarray"}
    for old, new in names.items():
        content = content.replace(old, new) if content.count(new) == 0 else content
    said = pickle.loads(content, encoding="bytes")
    said = {k.decode() if isinstance(k, bytes) else k: v for k, v in said.items()}
    return np.array_equal(said["data"], value[0]) and list(said["labels"]) == value[1].tolist()


def same_arrays(content, value):
    from scipy.io import loadmat

    said = loadmat(io.BytesIO(content))
    return all(np.array_equal(said[name], array, equal_nan=True) for name, array in value.items())


def same_image(content, value):
    with Image.open(io.BytesIO(content)) as opened:
        return np.array_equal(np.asarray(opened.convert("RGB")), value[0].permute(1, 2, 0).numpy())


def same_weights(content, value):
    """No checksum: what was read is at least finite and of the right shapes, which loading checks."""
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in value.values())


def same_results(content, value):
    """All but the time that an attack took, which nothing else tells."""
    return all(
        value[0][name] == row | {"seconds": value[0][name]["seconds"]} for name, row in RESULTS.items()
    ) and same(value[1], {name: IMAGES[name] for name in RESULTS})


def same_table(content, value):
    """Plain rows of cells below the names of columns, each cell as it is written; shares from 0 to 1."""
    lines = content.decode("utf-8-sig").split("\r\n")
    names, rows = lines[0].split(","), [line.split(",") for line in lines[1:-1]]
    said = [dict(zip(names, row, strict=True)) for row in rows]
    said = [{n: c if n == "method" else float(c) if c else None for n, c in row.items()} for row in said]
    shares = [row[name] for row in value for name in ("train_robust", "test_natural") if row[name] is not None]
    whole = lines[-1] == "" and set(names) == set(METRICS[0])
    return whole and said == value and all(0 <= share <= 1 for share in shares)


def same_masks(content, value):
    """No checksum: as many of everything as there should be, which reading checks."""
    return value["weights"].shape[:2] == (len(value["epochs"]), len(value["images"]))


def same_record(content, value):
    """What the file says, accuracies that are those of their counts, and nothing that the readers need left out."""
    said = json.loads(content.decode("utf-8-sig"))
    points = [p for curve in said.get("curves", {}).values() for p in curve["points"]]
    rows = points + list(said.get("results", {}).values())
    return said == value and rows != [] and all(row["correct"] / row["n"] == row["accuracy"] for row in rows)


RESULTS = evaluation()["results"]

# NAME: (name of the file, its bytes or what makes them, the reader, and what makes of bytes and result whether that is
# right; None: only the result of the whole file is). Mutations drawn by `make test`: the last number.
CORPUS = {
    "idx": ("train-images-idx3-ubyte", idx(GRAY), lambda p: files.read_idx(p, 3), same_pixels, 120),
    "idx.gz": ("train-images-idx3-ubyte.gz", gzip.compress(idx(GRAY)), lambda p: files.read_idx(p, 3), None, 150),
    "cifar binary": (
        "data_batch_1.bin",
        b"".join(bytes([label]) + row.tobytes() for label, row in zip([3, 9], PIXELS, strict=True)),
        lambda p: files.read_cifar_binary(p, "CIFAR-10", 1, 10),
        same_records,
        60,
    ),
    **{
        f"cifar pickle {protocol}": (
            "data_batch_1",
            batch(protocol),
            lambda p: files.read_cifar_pickle(p, "CIFAR-10", "labels", 10),
            same_batch,
            200,
        )
        for protocol in (0, 2, 4, 5)
    },
    "mat": ("train_32x32.mat", mat(False), lambda p: files.read_mat(p, "X", "y"), same_arrays, 150),
    "mat packed": ("train_32x32.mat", mat(True), lambda p: files.read_mat(p, "X", "y"), None, 150),
    **{
        f"image {kind}": (
            f"1.{kind.lower()}",
            image(kind),
            lambda p: files.read_images([p], (9, 7)),
            same_image,
            50,
        )
        for kind in ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
    },
    "annotations": (
        "val_annotations.txt",
        b"val_0.JPEG\tn01\t0\t0\t63\t63\nval_1.JPEG\tn02\t0\t0\t63\t63\n",
        lambda p: _val_annotations(p, {"n01": 0, "n02": 1}),
        lambda content, value: set(value.values()) <= {0, 1},
        60,
    ),
    "demo": (fashion_mnist.DEMO_FILE.name, lambda _: fashion_mnist.DEMO_FILE.read_bytes(), read_demo, None, 6),
    "config.json": (
        "config.json",
        json.dumps(TINY_RUN.to_json(), indent=2).encode(),
        lambda p: read_config(p.parent),
        as_the_file_says,
        400,
    ),
    "environment.json": (
        "environment.json",
        json.dumps({"part_fast": "0.1.0", "threads": 2, "tf32": {"matmul": False}, "resumed": [{}]}).encode(),
        lambda p: run_folder._first_environment(p.parent),
        same_json,
        150,
    ),
    "evaluation.json": ("evaluation.json", json.dumps(evaluation()).encode(), read_evaluation, same_results, 300),
    "evaluation of a report.json": (
        "evaluation.json",
        json.dumps(evaluation()).encode(),
        runs._read_evaluation,
        same_record,
        150,
    ),
    "sweep.json": ("sweep.json", json.dumps(swept()).encode(), read_sweep, same_record, 150),
    "metrics.csv": ("metrics.csv", written(lambda p: write_csv(p, METRICS)), runs.read_rows, same_table, 300),
    "stopped AutoAttack": (
        "evaluation_aa_0123.safetensors",
        written(stopped),
        lambda p: accuracy._read_kept(p, 200),
        None,
        150,
    ),
    "masks": (MASKS, written(mask_history), lambda p: read_masks(p.parent)._asdict(), same_masks, 150),
    "evaluation_images": (
        "evaluation_images.safetensors",
        written(lambda p: save_file(IMAGES, p)),
        read_evaluation,
        None,
        200,
    ),
    "weights": ("model.safetensors", written(lambda p: write_weights(p, WEIGHTS)), weights_of, None, 200),
    "weights of others": ("w.safetensors", written(lambda p: save_file(WEIGHTS, p)), weights_of, same_weights, 150),
    "checkpoint": ("w.pt", saved({"state_dict": WEIGHTS, "epoch": 3}), weights_of, None, 200),
    "checkpoint before 1.6": (
        "w.pth",
        saved(WEIGHTS, _use_new_zipfile_serialization=False),
        weights_of,
        same_weights,
        150,
    ),
    "state": (checkpoint.STATE, written(write_state), checkpoint._read, None, 150),
}

HOSTILE_JSON = [
    "null", "true", "-1", "0", "1e999", "NaN", "Infinity", "-Infinity", '""', '"x"', "[]", "{}", "[[]]", '"\\ud800"',
    '"\\u0000"', "1" * 5000, "[" * 100000, "-0.0", "0.5", "18446744073709551616", '{"a":1,"a":2}', "'x'", "1,",
]  # fmt: skip


def mutated(name, number, content):
    """Mutation `number` of a file: (what was done, the new bytes). A seed each, so that one can be repeated alone."""
    rng = random.Random(f"{name} {number}")
    size = len(content)
    at = rng.randrange(size)
    kinds = ["cut", "flip", "flip", "byte", "length", "remove", "repeat", "insert", "swap", "zero", "many"]
    if name.endswith(".json"):
        kinds = ["cut", "flip", "value", "value", "value", "missing", "double", "rename", "encode", "nest", "whole"]
    kind = rng.choice(kinds)
    data = bytearray(content)
    if kind == "cut":
        return kind, content[: rng.choice((at, at, 0, size - 1))]
    if kind in ("flip", "many"):
        for _ in range(1 if kind == "flip" else rng.randrange(2, 9)):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.choice((0, 1, 0x2E, 0x52, 0x7F, 0x80, 0xFF))
    elif kind == "length":
        width = rng.choice((2, 4, 8))
        value = rng.choice((0, 1, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1, size, size - 1)) % 2 ** (8 * width)
        data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
    elif kind == "remove":
        del data[at : at + rng.choice((1, 4, 100))]
    elif kind == "repeat":
        data[at:at] = data[at : at + rng.choice((1, 8, 200))]
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.choice((1, 3, 16)))
    elif kind == "swap":
        other = rng.randrange(size)
        data[at], data[other] = data[other], data[at]
    elif kind == "zero":
        data[at : at + 16] = bytes(min(16, size - at))
    elif kind == "encode":
        text = content.decode()
        with_mark, dos = b"\xef\xbb\xbf" + content, text.replace("\n", "\r\n").encode()
        return kind, rng.choice((with_mark, dos, text.encode("utf-16"), text.encode("utf-32"), content + b"\xff"))
    elif kind == "whole":
        return kind, rng.choice(HOSTILE_JSON).encode()
    else:
        return kind, json_mutation(kind, json.loads(content), rng)
    return kind, bytes(data)


def json_mutation(kind, values, rng):
    """An object changed at a random depth."""
    inner = values
    while any(isinstance(value, dict) and value for value in inner.values()) and rng.random() < 0.6:
        inner = rng.choice([value for value in inner.values() if isinstance(value, dict) and value])
    key = rng.choice(list(inner))
    if kind == "missing":
        del inner[key]
    elif kind == "rename":
        inner[rng.choice((key.upper(), key + " ", "", "../" + key, "\u0435" + key))] = inner.pop(key)
    else:
        inner[key] = "@@"
        new = {
            "value": rng.choice(HOSTILE_JSON),
            "double": f"1, {json.dumps(key)}: {rng.choice(HOSTILE_JSON[:12])}",
            "nest": rng.choice(("[", '{"a":')) * rng.choice((50, 900, 5000, 60000)),
        }[kind]
        return json.dumps(values).replace('"@@"', new).encode()
    return json.dumps(values).encode()


def same(one, other):
    """Equal results of a reader, tensors and arrays by value."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(other) and one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and one == other


class TooLongError(BaseException):
    """A reader hangs. No `except Exception` stops it."""


def too_long(*_):
    raise TooLongError


def outcome(read, path, judge, content, expected):
    """What is wrong with how a file was read, or None; and whether it was refused."""
    signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = read(path)
    except part_fast.UsageError as error:
        message = str(error)
        if "\n" in message or len(message) > 2000:
            return f"more than a line: {message[:300]!r}", True
        # The name of the file, of its partner, or of the field that it gives.
        return (None if path.name.partition(".")[0] in message else f"no name: {message[:300]}"), True
    except TooLongError:
        return "it hangs", False
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}", False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if same(got, expected):
        return None, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right = judge is not None and judge(content, got)
    except Exception as error:
        return f"read where others raise {type(error).__name__}: {str(error)[:100]}", False
    return (None if right else "another result without a word"), False


def fuzz(name, folder, numbers):
    file, make, read, judge, _ = CORPUS[name]
    content = make(folder) if callable(make) else make
    path = folder / file
    path.write_bytes(content)
    expected = read(path)
    wrong, refused = [], 0
    before, most = signal.signal(signal.SIGALRM, too_long), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for number in numbers:
            kind, changed = mutated(name, number, content)
            path.unlink()  # what was read of another file may still be mapped from it
            path.write_bytes(changed)
            problem, said = outcome(read, path, judge, changed, expected)
            refused += said
            if problem is not None:
                wrong.append(f"{name}, mutation {number} ({kind}): {problem}")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert wrong == [], f"{len(wrong)} of {len(numbers)}\n" + "\n".join(wrong[:20])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) / 1024
    assert grown < 300, f"{name}: {grown:.0f} MiB more memory"
    return len(numbers), refused


def test_an_array_that_numpy_would_not_make_is_refused(tmp_path):
    """It begins with no elements; bytes in the place of that number are what Python's own unpickler refuses too."""
    content = batch(4)
    begins = content.index(b"K\x00\x85")
    (tmp_path / "batch").write_bytes(content[:begins] + b"C" + content[begins + 1 :])
    with pytest.raises(part_fast.UsageError, match=r"batch is not a CIFAR-10 batch: an array that is made in another"):
        files.read_cifar_pickle(tmp_path / "batch", "CIFAR-10", "labels", 10)


@pytest.mark.parametrize("name", CORPUS)
def test_damaged_files_are_refused_in_one_line_or_read_right(name, tmp_path):
    tried, refused = fuzz(name, tmp_path, range(CORPUS[name][-1]))
    assert refused > 0, f"{tried} mutations, none of which was refused"


def test_there_are_enough_mutations():
    assert sum(row[-1] for row in CORPUS.values()) >= 2000


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPUS)
def test_many_more(name, tmp_path, capsys):
    tried, refused = fuzz(name, tmp_path, range(10_000, 10_000 + 12 * CORPUS[name][-1]))
    with capsys.disabled():
        print(f"\n{name}: {tried} mutations, {refused} refused")

"""Data: augmentation against one image at a time, every file layout, damaged files, subsets, batches, seeds."""

import gzip
import io
import os
import pickle
import re
import struct
import tarfile
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from part_fast.data import fashion_mnist
from part_fast.data.catalogue import load
from part_fast.data.fashion_mnist import DEBIAN_FASHION_MNIST, DEMO_FILE
from part_fast.data.memory import (
    Augmentation,
    Dataset,
    augment,
    balanced_indices,
    batch_length,
    draw_augmentation,
    to_float,
)


def one_by_one(images, drawn, padding, fill):
    """Pad, crop and flip each image on its own."""
    out = []
    for image, dy, dx, flip in zip(images, drawn.dy.tolist(), drawn.dx.tolist(), drawn.flip.tolist(), strict=True):
        height, width = image.shape[-2:]
        padded = F.pad(image, (padding,) * 4, value=fill)
        crop = padded[:, padding + dy : padding + dy + height, padding + dx : padding + dx + width]
        out.append(crop.flip(-1) if flip else crop)
    return torch.stack(out)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 5),
    channels=st.integers(1, 4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 6),
    flip=st.booleans(),
    kind=st.sampled_from(["uint8", "float32", "float64", "bfloat16", "bool"]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_augmentation_is_pad_crop_flip(n, channels, height, width, padding, flip, kind, channels_last, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, kind)
    images = torch.randint(0, 256, (n, channels, height, width), generator=generator)
    images = images > 100 if dtype == torch.bool else (images.to(dtype) if kind == "uint8" else images.to(dtype) / 255)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    drawn = draw_augmentation(n, crop_padding=padding, flip=flip, generator=generator)
    assert drawn.dy.abs().max() <= padding
    assert drawn.dx.abs().max() <= padding
    assert flip or not drawn.flip.any()
    before = images.clone()
    for fill in (0.0, 1.0) if dtype == torch.bool else (0.0, 7 / 255):
        out = drawn.apply(images, fill)
        source = images.float() / 255 if kind == "uint8" else images
        assert torch.equal(out, one_by_one(source, drawn, padding, fill))
        assert out.dtype == source.dtype
        assert out.is_contiguous()
    assert torch.equal(images, before)


def test_augment_is_the_drawn_augmentation_and_obeys_the_seed():
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    out = augment(images, generator=torch.Generator().manual_seed(3))
    drawn = draw_augmentation(64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(out, drawn.apply(images))
    assert not torch.equal(out, augment(images, generator=torch.Generator().manual_seed(4)))
    torch.manual_seed(3)
    first = augment(images)
    torch.manual_seed(3)
    assert torch.equal(first, augment(images))
    assert torch.equal(augment(images, crop_padding=0, flip=False), to_float(images))


def test_draws_every_shift_and_flip_equally_often():
    drawn = draw_augmentation(90_000, generator=torch.Generator().manual_seed(0))
    for shift in (drawn.dy, drawn.dx):
        counts = torch.bincount(shift + 4)
        assert counts.shape == (9,)
        assert (counts - 10_000).abs().max() < 500  # five standard deviations of sqrt(90000 * 1/9 * 8/9)
    assert abs(drawn.flip.sum().item() - 45_000) < 750  # five of sqrt(90000 / 4)
    # dy, dx and flip are independent: no correlation beyond five standard errors
    table = torch.stack([drawn.dy.double(), drawn.dx.double(), drawn.flip.double()])
    assert (torch.corrcoef(table) - torch.eye(3)).abs().max() < 5 / 300


def test_augmentation_moves_a_mask_with_its_image():
    images = torch.randint(0, 200, (16, 3, 32, 32), dtype=torch.uint8)
    mask = (images > 90).any(1, keepdim=True)
    drawn = draw_augmentation(16, generator=torch.Generator().manual_seed(1))
    moved = drawn.apply(images)
    assert torch.equal(drawn.apply(mask), (moved > 90.5 / 255).any(1, keepdim=True))


def test_empty_batch():
    assert augment(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 3, 8, 8)


def test_to_float_is_a_division_by_255():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(every), every.float() / 255)
    assert to_float(every)[-1] == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_to_float_leaves_its_input_alone(dtype):
    images = torch.arange(0, 240, 10).to(dtype).view(2, 3, 2, 2)
    kept = images.clone()
    assert torch.equal(to_float(images), kept.float() / 255)
    assert torch.equal(images, kept)
    assert torch.equal(to_float(images[:, :, ::2]), kept.float()[:, :, ::2] / 255)
    assert torch.equal(images, kept)


def test_augmentation_errors():
    with pytest.raises(ValueError, match=r"^crop_padding takes an integer >= 0, got -1$"):
        draw_augmentation(3, crop_padding=-1)
    drawn = Augmentation(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(2).bool())
    for shape in ((3, 1, 4, 4), (2, 4, 4)):
        message = f"^images takes \\(2,C,H,W\\), as many as were drawn, got {re.escape(str(shape))}$"
        with pytest.raises(ValueError, match=message):
            drawn.apply(torch.zeros(shape))


def tiny(labels, num_classes=None):
    labels = torch.tensor(labels, dtype=torch.int64)
    count = int(labels.max()) + 1 if num_classes is None else num_classes
    images = torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    return Dataset(images, labels, count, tuple(f"class {i}" for i in range(count)), "tiny", "train")


@settings(deadline=None, max_examples=60)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), data_=st.data(), seed=st.integers(0, 1000))
def test_subset_is_as_balanced_as_the_data_allows(labels, data_, seed):
    n = data_.draw(st.integers(1, len(labels)))
    dataset = tiny(labels, 6)
    part = dataset.subset(n, seed)
    assert len(part) == n
    places = part.images[:, 0, 0, 0].long()
    assert torch.equal(places, places.unique())  # no image twice, and in their order
    assert torch.equal(part.labels, dataset.labels[places])
    have, taken = (torch.bincount(x.labels, minlength=6) for x in (dataset, part))
    # A class may only be behind the fullest by more than one if it has no images left.
    assert ((taken >= taken.max() - 1) | (taken == have)).all()
    assert torch.equal(part.labels, dataset.subset(n, seed).labels)
    if n > 1:
        assert set(balanced_indices(dataset.labels, n - 1, seed).tolist()) < set(places.tolist())


def test_subset_depends_on_the_seed_and_refuses_bad_sizes():
    dataset = tiny([i % 4 for i in range(100)])
    assert not torch.equal(dataset.subset(20, 0).images, dataset.subset(20, 1).images)
    for n in (0, 101, 2.0):
        with pytest.raises(ValueError, match=f"^n takes an integer from 1 to 100, the number of images, got {n}$"):
            dataset.subset(n)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("n", "size"), [(10, 3), (12, 4), (3, 8), (1, 1)])
def test_batches_cover_every_index_once(n, size, shuffle):
    dataset = tiny([i % 3 for i in range(n)], 3)
    batches = list(dataset.batches(size, shuffle=shuffle))
    assert [len(b.labels) for b in batches] == [size] * (n // size) + ([n % size] if n % size else [])
    indices = torch.cat([b.indices for b in batches])
    assert torch.equal(indices.sort().values, torch.arange(n))
    for batch in batches:
        assert torch.equal(batch.images, dataset.images[batch.indices])
        assert torch.equal(batch.labels, dataset.labels[batch.indices])
        assert batch.images.dtype == torch.uint8
    assert shuffle or torch.equal(indices, torch.arange(n))
    dropped = list(dataset.batches(size, shuffle=shuffle, drop_last=True))
    assert [len(b.labels) for b in dropped] == [size] * (n // size)


@pytest.mark.parametrize(
    ("n", "size", "lengths"),
    [(9, 4, [4, 5]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (5, 4, [5]), (1, 4, [1]), (3, 1, [1, 1, 1]), (0, 4, [])],
)
def test_a_last_single_image_joins_the_batch_before(n, size, lengths):
    dataset = tiny([i % 3 for i in range(n)], 3)
    batches = list(dataset.batches(size, join_last=True))
    assert [len(b.labels) for b in batches] == lengths
    assert torch.cat([b.indices for b in batches] or [torch.empty(0)]).tolist() == list(range(n))
    left, counted = n, []
    while left:
        counted.append(batch_length(left, size))
        left -= counted[-1]
    assert counted == lengths


def test_batches_obey_the_seed():
    dataset = tiny([0] * 50)

    def order(**kwargs):
        return torch.cat([b.indices for b in dataset.batches(8, shuffle=True, **kwargs)])

    first = order(generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, order(generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(first, order(generator=torch.Generator().manual_seed(6)))
    torch.manual_seed(7)
    first = order()
    assert not torch.equal(first, order())
    torch.manual_seed(7)
    assert torch.equal(first, order())
    with pytest.raises(ValueError, match=r"^batch_size takes an integer >= 1, got 0$"):
        dataset.batches(0)


def test_dataset_refuses_what_does_not_fit():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    for arguments, message in (
        ((images.float(), labels, 2), "images takes a uint8 tensor"),
        ((images[0], labels, 2), "images takes a uint8 tensor"),
        ((images, labels[:1], 2), r"labels takes an int64 tensor \(2,\), one per image"),
        ((images, labels.int(), 2), "labels takes an int64 tensor"),
        ((images, labels - 1, 2), "labels takes values from 0 to 1, got -1"),
        ((images, labels + 1, 2), "labels takes values from 0 to 1, got 2"),
        ((images, labels, 3), "class_names takes 3 names, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Dataset(*arguments, ("a", "b"), "made", "train")
    moved = Dataset(images, labels, 2, ("a", "b"), "made", "train").to("cpu")
    assert moved.images.device.type == "cpu"
    assert len(moved) == 2


# The embedded demo


@pytest.mark.parametrize(("split", "count"), [("train", 6000), ("test", 1000)])
def test_demo(split, count):
    start = time.perf_counter()
    demo = load("demo", split)
    # 0.3 s on one free core; the bound leaves room for a busy one and still catches a second decompression
    assert time.perf_counter() - start < 2
    assert demo.images.shape == (count, 3, 32, 32)
    assert torch.bincount(demo.labels).tolist() == [count // 10] * 10
    assert torch.equal(demo.images[:, 0], demo.images[:, 1])
    assert torch.equal(demo.images[:, 0], demo.images[:, 2])
    border = demo.images.clone()
    border[:, :, 2:30, 2:30] = 0
    assert border.max() == 0
    # Fashion-MNIST's pixels: mean 0.2860 within 28x28, so 0.2190 of 32x32
    assert demo.images.float().mean().item() / 255 == pytest.approx(0.219, abs=0.006)
    trousers = demo.images[demo.labels == 1, 0].float().mean(0)
    bags = demo.images[demo.labels == 8, 0].float().mean(0)
    assert trousers[:, 2:8].mean() < 0.1 * trousers[:, 12:20].mean()  # narrow
    assert bags[:, 4:8].mean() > 0.3 * bags[:, 12:20].mean()  # wide


def test_demo_file_is_small_and_says_where_it_is_from():
    import io
    import lzma

    assert DEMO_FILE.stat().st_size < 3_000_000
    with np.load(io.BytesIO(lzma.decompress(DEMO_FILE.read_bytes())), allow_pickle=False) as arrays:
        assert "zalandoresearch/fashion-mnist" in str(arrays["about"])
        assert "MIT" in str(arrays["about"])
        assert len(np.unique(arrays["train_indices"])) == 6000
    assert "Zalando SE" in (DEMO_FILE.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(
    not (DEBIAN_FASHION_MNIST / "train-images-idx3-ubyte.gz").is_file(),
    reason="the full Fashion-MNIST (Debian's dataset-fashion-mnist) is not installed",
)
def test_demo_is_what_its_script_takes_from_the_full_set(monkeypatch):
    import io
    import lzma

    monkeypatch.delenv("PART_FAST_DATA", raising=False)
    with np.load(io.BytesIO(lzma.decompress(DEMO_FILE.read_bytes())), allow_pickle=False) as arrays:
        indices = {split: torch.from_numpy(arrays[f"{split}_indices"]).long() for split in ("train", "test")}
    for split, count in (("train", 60_000), ("test", 10_000)):
        full, demo = load("fashion-mnist", split, DEBIAN_FASHION_MNIST), load("demo", split)
        assert len(full) == count
        assert torch.bincount(full.labels).tolist() == [count // 10] * 10
        assert torch.equal(full.images[indices[split]], demo.images)
        assert torch.equal(full.labels[indices[split]], demo.labels)
        assert torch.equal(balanced_indices(full.labels, len(demo), 0), indices[split])


def test_a_damaged_demo_file_is_refused(tmp_path, monkeypatch):
    content = bytearray(DEMO_FILE.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "demo.npz.xz"
    damaged.write_bytes(content)
    monkeypatch.setattr(fashion_mnist, "DEMO_FILE", damaged)
    with pytest.raises(ValueError, match=r"^.*demo.npz.xz is damaged: sha256 .* reinstall part_fast$"):
        load("demo", "train")
    damaged.unlink()
    with pytest.raises(FileNotFoundError, match=r"^the demo images are missing at .*: reinstall part_fast$"):
        load("demo", "train")


# Fashion-MNIST in small

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
GRAY_LABELS = np.array([3, 0, 9, 9, 1], dtype=np.uint8)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder, images=None, labels=None, stem="train", packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"images-idx3": idx(GRAY) if images is None else images}
    contents["labels-idx1"] = idx(GRAY_LABELS) if labels is None else labels
    for kind, content in contents.items():
        name = f"{stem}-{kind}-ubyte"
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("where", ["FashionMNIST/raw", "."])
@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_layouts(tmp_path, packed, where, split):
    write_fashion(tmp_path / where, stem="train" if split == "train" else "t10k", packed=packed)
    published = 60000 if split == "train" else 10000
    with pytest.warns(UserWarning, match=f"fashion-mnist {split} in .* has 5 images, the published set {published}$"):
        dataset = load("fashion-mnist", split, tmp_path)
    expected = np.pad(GRAY, ((0, 0), (2, 2), (2, 2)))[:, None].repeat(3, 1)
    assert torch.equal(dataset.images, torch.from_numpy(expected))
    assert dataset.labels.tolist() == GRAY_LABELS.tolist()
    assert dataset.class_names[9] == "Ankle boot"
    assert (dataset.name, dataset.split, dataset.num_classes) == ("fashion-mnist", split, 10)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images": b""}, "train-images-idx3-ubyte is not an idx file of uint8 with 3 dimensions"),
        ({"images": idx(GRAY)[:3]}, "is not an idx file of uint8 with 3 dimensions: it starts 00 00 08"),
        ({"images": idx(GRAY)[:15]}, "is not an idx file of uint8 with 3 dimensions"),
        (
            {"images": b"\0\0\x0d\x03" + idx(GRAY)[4:]},
            "is not an idx file of uint8 with 3 dimensions: it starts 00 00 0d",
        ),
        ({"images": idx(GRAY_LABELS)}, "is not an idx file of uint8 with 3 dimensions: it starts 00 00 08 01"),
        ({"images": idx(GRAY)[:-1]}, r"has 3935 bytes, its header \(5, 28, 28\) says 3936"),
        ({"images": idx(GRAY) + b"\0"}, r"has 3937 bytes, its header \(5, 28, 28\) says 3936"),
        ({"images": b"\0\0\x08\x03" + b"\xff" * 12}, r"says that it holds \(4294967295, .* more than 2147483648 bytes"),
        ({"images": gzip.compress(idx(GRAY))[:-20]}, "is not a whole gzip file"),
        ({"images": idx(GRAY[:, :27])}, "holds images of 27x28, Fashion-MNIST has 28x28"),
        ({"images": idx(GRAY[:4])}, "holds 4 train images but 5 labels"),
        ({"images": idx(GRAY[:0]), "labels": idx(GRAY_LABELS[:0])}, "holds no train images"),
        ({"labels": idx(GRAY_LABELS + 1)}, "labels takes values from 0 to 9, got 10"),
    ],
)
@pytest.mark.filterwarnings("ignore:fashion-mnist train in")
def test_damaged_fashion_mnist(tmp_path, files, message):
    write_fashion(tmp_path, **files)
    with pytest.raises(ValueError, match=message) as caught:
        load("fashion-mnist", "train", tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# CIFAR-10 in small

PIXELS = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
LABELS = [7, 0, 9, 2]


def python2_pickle(pixels, labels):
    """The opcodes of the published files: protocol 2, byte strings for keys, dtype name and pixels."""

    def short(text):
        return b"U" + bytes([len(text)]) + text

    def integer(value):
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + short(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + short(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + short(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    content = b"T" + struct.pack("<i", pixels.size) + pixels.tobytes()
    state = b"(" + integer(1) + integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86" + dtype + b"\x89"
    array += state + content + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\x02}("
        + short(b"data")
        + array
        + short(b"labels")
        + numbers
        + short(b"batch_label")
        + short(b"x")
        + b"u."
    )


def as_pickle(protocol, text_keys=True):
    batch = {"data": PIXELS, "labels": LABELS, "batch_label": "made up", "filenames": ["a.png"] * 4}
    return pickle.dumps(batch if text_keys else {k.encode(): v for k, v in batch.items()}, protocol)


def write_cifar(root, content, layout="py", names=("data_batch_1",)):
    folder = root / f"cifar-10-batches-{layout}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / (f"{name}.bin" if layout == "bin" else name)).write_bytes(content)
    return folder


def binary(pixels=PIXELS, labels=LABELS):
    return b"".join(bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True))


def test_the_made_up_python2_pickle_is_one():
    batch = pickle.loads(python2_pickle(PIXELS, LABELS), encoding="bytes")
    assert np.array_equal(batch[b"data"], PIXELS)
    assert batch[b"labels"] == LABELS


@pytest.mark.parametrize(
    ("layout", "content"),
    [
        ("py", python2_pickle(PIXELS, LABELS)),
        *(("py", as_pickle(protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)),
        ("py", as_pickle(2, text_keys=False)),
        ("bin", binary()),
    ],
)
def test_cifar10_layouts(tmp_path, layout, content):
    folder = write_cifar(tmp_path, content, layout, ("data_batch_1", "data_batch_3", "test_batch"))
    for root in (tmp_path, folder):
        with pytest.warns(UserWarning, match="cifar10 train in .* has 8 images, the published set 50000$"):
            train = load("cifar10", "train", root)
        with pytest.warns(UserWarning, match="cifar10 test in .* has 4 images, the published set 10000$"):
            test = load("cifar10", "test", root)
        assert torch.equal(test.images, torch.from_numpy(PIXELS.reshape(4, 3, 32, 32)))
        assert test.labels.tolist() == LABELS
        assert torch.equal(train.images, torch.cat([test.images] * 2))
        assert train.labels.tolist() == LABELS * 2
        assert train.class_names[7] == "horse"
        train.images.add_(1)  # owns its memory


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def object_array():
    array = np.empty((4, 3072), dtype=object)
    array[:] = 0
    return array


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_cifar10_pickles_run_no_code(tmp_path, protocol):
    mark = tmp_path / "ran"
    trap = pickle.dumps({"data": PIXELS, "labels": LABELS, "more": _Touch(mark)}, protocol)
    write_cifar(tmp_path, trap)
    with pytest.raises(ValueError, match=r"is not a CIFAR-10 batch: it names .*open, which is not a part"):
        load("cifar10", "train", tmp_path)
    assert not mark.exists()
    pickle.loads(trap)["more"].close()  # the same bytes do run it for whoever lets them
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a CIFAR-10 batch"),
        (as_pickle(4)[:-50], "is not a CIFAR-10 batch"),
        (as_pickle(4)[:2000], "is not a CIFAR-10 batch"),
        (b"\x00" * 100, "is not a CIFAR-10 batch"),
        (b"cos\nsystem\n(S'true'\ntR.", "it names os.system, which is not a part of an image batch"),
        (b"cnumpy\nload\n(S'x'\ntR.", "it names numpy.load, which is not a part of an image batch"),
        (pickle.dumps([1]), "takes an array 'data' and a list 'labels'"),
        (pickle.dumps({"data": PIXELS}), "takes an array 'data' and a list 'labels'"),
        (pickle.dumps({"data": PIXELS.tolist(), "labels": LABELS}), "takes an array 'data' and a list 'labels'"),
        (pickle.dumps({"data": PIXELS.astype(np.int16), "labels": LABELS}), "an array of 'i2', expected uint8"),
        (pickle.dumps({"data": object_array(), "labels": LABELS}), "an array of 'O8', expected uint8"),
        (pickle.dumps({"data": np.asfortranarray(PIXELS), "labels": LABELS}), "not uint8 in C order"),
        (pickle.dumps({"data": PIXELS, "labels": LABELS[:3]}), r"3 labels, data \(4, 3072\)"),
        (pickle.dumps({"data": PIXELS[:, :3071], "labels": LABELS}), r"4 labels, data \(4, 3071\)"),
        (pickle.dumps({"data": PIXELS, "labels": [0, 1, 2, 10]}), "labels takes integers from 0 to 9"),
        (pickle.dumps({"data": PIXELS, "labels": [0, 1, 2, -1]}), "labels takes integers from 0 to 9"),
        (pickle.dumps({"data": PIXELS, "labels": [0, 1, 2, 2.5]}), "labels takes integers from 0 to 9"),
        (python2_pickle(PIXELS, LABELS).replace(b"\x00\x0c\x00\x00\x86", b"\x01\x0c\x00\x00\x86"), r"data \(4, 3073\)"),
    ],
)
def test_damaged_cifar10_pickles(tmp_path, content, message):
    write_cifar(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        load("cifar10", "train", tmp_path)
    assert "\n" not in str(caught.value)
    assert "data_batch_1" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, CIFAR-10's binary files hold images of 3073 bytes each"),
        (binary()[:-1], "has 12291 bytes, CIFAR-10's binary files hold images of 3073 bytes each"),
        (binary(labels=[0, 1, 2, 10]), "labels takes values from 0 to 9, got 10"),
    ],
)
@pytest.mark.filterwarnings("ignore:cifar10 train in")
def test_damaged_cifar10_binaries(tmp_path, content, message):
    write_cifar(tmp_path, content, "bin")
    with pytest.raises(ValueError, match=message):
        load("cifar10", "train", tmp_path)


# Where it looks


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A working folder, home and $PART_FAST_DATA without any data, and no Debian package."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PART_FAST_DATA", str(tmp_path / "named"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    return tmp_path


def test_a_missing_data_set_names_every_place(nowhere):
    with pytest.raises(FileNotFoundError) as caught:
        load("fashion-mnist", "train")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("named/FashionMNIST/raw", "data/FashionMNIST/raw", "home/.cache/part_fast/FashionMNIST/raw", "debian"):
        assert part in message
    for part in ("train-images-idx3-ubyte", "dataset-fashion-mnist", "PART_FAST_DATA", "download=True", "--download"):
        assert part in message
    with pytest.raises(FileNotFoundError, match=r"named/cifar-10-batches-py.*data/cifar-10-batches-bin.*--download"):
        load("cifar10", "test")
    with pytest.raises(FileNotFoundError) as caught:
        load("fashion-mnist", "test", nowhere / "here")
    assert str(nowhere / "here") in str(caught.value)
    assert "debian" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:fashion-mnist train in")
def test_the_order_of_places(nowhere, monkeypatch):
    folders = [
        nowhere / "debian",
        nowhere / "home" / ".cache" / "part_fast",
        nowhere / "work" / "data",
        nowhere / "named",
    ]
    for folder in folders:
        write_fashion(folder)
        assert os.path.abspath(load("fashion-mnist", "train").source) == str(folder)
    monkeypatch.delenv("PART_FAST_DATA")
    assert os.path.abspath(load("fashion-mnist", "train").source) == str(folders[2])


def test_images_without_labels_are_not_a_data_set(nowhere):
    write_fashion(nowhere / "here")
    (nowhere / "here" / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        load("fashion-mnist", "train", nowhere / "here")


@pytest.mark.filterwarnings("ignore:.* has . images")
def test_download_goes_through_torchvision_and_only_when_needed(nowhere, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    calls = []

    def fake(root, download):
        calls.append((root, download))
        write_fashion(nowhere / "named" / "FashionMNIST" / "raw")

    monkeypatch.setattr(datasets, "FashionMNIST", fake)
    for _ in range(2):
        assert len(load("fashion-mnist", "train", download=True)) == 5
    assert calls == [(str(nowhere / "named"), True)]

    def broken(root, download):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(datasets, "FashionMNIST", broken)
    with pytest.raises(OSError, match=r"^download of .* to .*/empty failed: no route$"):
        load("fashion-mnist", "train", nowhere / "empty", download=True)


def archive(path, members):
    """A tar.gz at `path` of (name, content) pairs; a content that is a string is the target of a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.filterwarnings("ignore:.* has . images")
def test_a_downloaded_archive_is_unpacked_here(nowhere, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    calls = []

    def url(url, root, name, md5):
        calls.append((url, root, name, len(md5)))
        archive(nowhere / "named" / name, [("cifar-10-batches-py/data_batch_1", as_pickle(4))])

    monkeypatch.setattr(datasets.utils, "download_url", url)
    for _ in range(2):
        assert len(load("cifar10", "train", download=True)) == 4
    assert calls == [(datasets.CIFAR10.url, str(nowhere / "named"), "cifar-10-python.tar.gz", 32)]


@pytest.mark.parametrize(
    "members",
    [
        [("../outside", b"x")],
        [("cifar-10-batches-py/../../outside", b"x")],
        [("link", ".."), ("link/outside", b"x")],
        [("link", "../outside")],
        [("cifar-10-batches-py/data_batch_1", "/etc/passwd")],
    ],
    ids=["up", "up from within", "through a link", "link up", "link to a file"],
)
def test_no_archive_is_unpacked_outside_its_folder(nowhere, monkeypatch, members):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    monkeypatch.setattr(
        datasets.utils, "download_url", lambda url, root, name, md5: archive(nowhere / "named" / name, members)
    )
    with pytest.raises(OSError, match=r"^download of CIFAR10 to .*/named failed: .*/cifar-10-python.tar.gz cannot be"):
        load("cifar10", "train", download=True)
    assert not (nowhere / "outside").exists()
    assert [path.name for path in (nowhere / "named").rglob("*") if path.is_file()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("cut", [0, 100], ids=["empty", "cut off"])
def test_a_damaged_archive_is_one_line(nowhere, monkeypatch, cut):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")

    def url(url, root, name, md5):
        path = nowhere / "named" / name
        archive(path, [("cifar-10-batches-py/data_batch_1", as_pickle(4))])
        path.write_bytes(path.read_bytes()[:cut])

    monkeypatch.setattr(datasets.utils, "download_url", url)
    with pytest.raises(OSError, match=r"^download of CIFAR10 to .* failed: .*10-python.tar.gz cannot be unpacked"):
        load("cifar10", "train", download=True)


def test_unknown_names_list_the_known():
    known = "demo, fashion-mnist, cifar10, cifar100, svhn, tinyimagenet, folder:PATH"
    for name in ("mnist", "folder:", "folder"):
        with pytest.raises(ValueError, match=f"^data set takes one of {known}, got '{name}'$"):
            load(name, "train")
    with pytest.raises(ValueError, match=r"^split takes 'train' or 'test', got 'val'$"):
        load("demo", "val")

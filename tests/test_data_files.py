"""CIFAR-100, SVHN, TinyImageNet, image folders: each layout in small, damaged files, wrong labels, missing data."""

import io
import os
import pickle
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from part_fast.data.catalogue import load
from part_fast.data.files import image_size, read_images, read_mat

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)


def refused(name, split, root, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        load(name, split, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A working folder, home and $PART_FAST_DATA without any data."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PART_FAST_DATA", str(tmp_path / "named"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cifar100", ("cifar-100-python", "cifar-100-binary", "--download")),
        ("svhn", ("test_32x32.mat", "named/svhn", "--download")),
        (
            "tinyimagenet",
            ("tiny-imagenet-200.zip", "named/tiny-imagenet-200", "wnids.txt", "torchvision has no download"),
        ),
        ("folder:pictures", ("pictures/test", "pictures/val", "nothing is downloaded")),
    ],
)
def test_what_is_missing_names_every_place_and_the_remedy(nowhere, name, parts):
    message = refused(name, "test", None, f"^{re.escape(name)} not found: looked for ", FileNotFoundError)
    for part in parts:
        assert part in message
    if not name.startswith("folder:"):
        for part in ("named", "data", "home/.cache/part_fast", "PART_FAST_DATA"):
            assert part in message
    assert str(nowhere / "here") in refused(name, "train", nowhere / "here", "not found", FileNotFoundError)


# CIFAR-100

FINE, COARSE = [99, 0, 42, 7], [13, 4, 8, 2]


def cifar100_pickle(**other):
    batch = {"filenames": ["a"] * 4, "fine_labels": FINE, "coarse_labels": COARSE, "data": IMAGES.reshape(4, 3072)}
    return pickle.dumps(batch | other, 2)


def cifar100_binary(fine=FINE):
    rows = zip(COARSE, fine, IMAGES.reshape(4, 3072), strict=True)
    return b"".join(bytes([coarse, label]) + row.tobytes() for coarse, label, row in rows)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("layout", "suffix", "content"),
    [("cifar-100-python", "", cifar100_pickle()), ("cifar-100-binary", ".bin", cifar100_binary())],
)
def test_cifar100_layouts(tmp_path, layout, suffix, content):
    for split, published in (("train", 50000), ("test", 10000)):
        write(tmp_path / layout / f"{split}{suffix}", content)
        for root in (tmp_path, tmp_path / layout):
            with pytest.warns(
                UserWarning, match=f"cifar100 {split} in .* has 4 images, the published set {published}$"
            ):
                dataset = load("cifar100", split, root)
            assert torch.equal(dataset.images, torch.from_numpy(IMAGES))
            assert dataset.labels.tolist() == FINE
            assert dataset.num_classes == 100
            assert [dataset.class_names[i] for i in FINE] == ["worm", "apple", "leopard", "beetle"]


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_cifar100_pickles_run_no_code(tmp_path):
    write(tmp_path / "cifar-100-python" / "train", cifar100_pickle(more=_Touch(tmp_path / "ran")))
    refused("cifar100", "train", tmp_path, "is not a CIFAR-100 batch: it names .*open, which is not a part")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train", b"", "train is not a CIFAR-100 batch"),
        ("train", cifar100_pickle()[:-9], "train is not a CIFAR-100 batch"),
        ("train", cifar100_pickle(fine_labels=[0, 1, 2, 100]), "fine_labels takes integers from 0 to 99"),
        ("train", cifar100_pickle(fine_labels=[0, 1, 2]), r"3 labels, data \(4, 3072\)"),
        ("train", pickle.dumps({"data": IMAGES.reshape(4, 3072), "labels": FINE}), "and a list 'fine_labels'"),
        (
            "train.bin",
            cifar100_binary()[:-1],
            "has 12295 bytes, CIFAR-100's binary files hold images of 3074 bytes each",
        ),
        ("train.bin", cifar100_binary([0, 1, 2, 100]), "labels takes values from 0 to 99, got 100"),
    ],
)
@pytest.mark.filterwarnings("ignore:cifar100 train in")
def test_damaged_cifar100(tmp_path, file, content, message):
    write(tmp_path / ("cifar-100-binary" if file.endswith(".bin") else "cifar-100-python") / file, content)
    assert str(tmp_path) in refused("cifar100", "train", tmp_path, message)


# SVHN: MATLAB files

DIGITS = np.array([[10], [1], [9], [3]], dtype=np.uint8)


def element(kind, data, order="<"):
    """One element by the published format: tag, data, padding to 8 bytes; up to 4 bytes of data go into the tag."""
    if kind != 15 and 0 < len(data) <= 4:
        return struct.pack(f"{order}I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    padding = b"" if kind == 15 else bytes(-len(data) % 8)
    return struct.pack(f"{order}II", kind, len(data)) + data + padding


def matrix(name, array, storage=2, array_class=9, order="<", packed=True, flags=0):
    body = element(6, struct.pack(f"{order}II", flags | array_class, 0), order)
    body += element(5, struct.pack(f"{order}{array.ndim}i", *array.shape), order)
    body += element(1, name.encode(), order)
    swapped = array.astype(array.dtype.newbyteorder(order))
    body += element(storage, swapped.tobytes(order="F"), order)
    whole = element(14, body, order)
    return element(15, zlib.compress(whole), order) if packed else whole


def mat(*matrices, order="<", version=0x0100, text=b"MATLAB 5.0 MAT-file"):
    return text.ljust(124) + struct.pack(f"{order}H", version) + (b"IM" if order == "<" else b"MI") + b"".join(matrices)


X = IMAGES.transpose(2, 3, 1, 0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("where", [".", "svhn"])
def test_svhn_layouts(tmp_path, packed, order, where):
    # As published: y is an array of doubles that MATLAB stored in bytes; the other array is to be passed over.
    note = matrix("note", np.frombuffer(b"cells", np.uint8)[None], 2, 1, order, packed)
    content = mat(
        note, matrix("X", X, order=order, packed=packed), matrix("y", DIGITS, 2, 6, order, packed), order=order
    )
    for split, published in (("train", 73257), ("test", 26032)):
        write(tmp_path / where / f"{split}_32x32.mat", content)
        with pytest.warns(UserWarning, match=f"svhn {split} in .* has 4 images, the published set {published}$"):
            dataset = load("svhn", split, tmp_path)
        assert torch.equal(dataset.images, torch.from_numpy(IMAGES))
        assert dataset.images.is_contiguous()
        assert dataset.labels.tolist() == [0, 1, 9, 3]
        assert dataset.class_names == tuple("0123456789")
        dataset.images.add_(1)  # owns its memory


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["uint8", "int64", "float64", "float32", "uint16"])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.filterwarnings("ignore:svhn test in")
def test_svhn_files_as_scipy_writes_them(tmp_path, packed, kind, count):
    scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    x, digits = X[..., :count], DIGITS[:count].astype(kind)
    path = tmp_path / "test_32x32.mat"
    scipy_io.savemat(path, {"about": "text", "X": x, "cells": np.array([{"a": 1}]), "y": digits}, do_compression=packed)
    dataset = load("svhn", "test", tmp_path)
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES[:count]))
    assert dataset.labels.tolist() == [0, 1, 9, 3][:count]
    ours, theirs = read_mat(path, "X", "y"), scipy_io.loadmat(path)
    for name in ("X", "y"):
        assert np.array_equal(ours[name], theirs[name])
        assert ours[name].dtype == theirs[name].dtype


def test_svhn_of_one_image_without_its_last_dimension(tmp_path):
    write(tmp_path / "test_32x32.mat", mat(matrix("X", X[..., 0]), matrix("y", DIGITS[:1])))
    with pytest.warns(UserWarning, match="has 1 images"):
        assert torch.equal(load("svhn", "test", tmp_path).images, torch.from_numpy(IMAGES[:1]))


GOOD_X, GOOD_Y = matrix("X", X), matrix("y", DIGITS)
HUGE = struct.pack("<II", 14, 2**32 - 8) + bytes(16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a MATLAB 5 file$"),
        (b"MATLAB 7.3 MAT-file".ljust(512), r"is not a MATLAB 5 file \(version 7.3 is HDF5: save it as version 7\)$"),
        (mat(GOOD_X, GOOD_Y, version=0x0200), "is a damaged MATLAB file: another version than 5 to 7"),
        (mat(GOOD_X, GOOD_Y)[:-20], "is a damaged MATLAB file: an element of"),
        (mat(GOOD_X, GOOD_Y)[:-1] + b"\xff", "is a damaged MATLAB file"),
        (mat(GOOD_X, GOOD_Y, b"\0\0\0"), "is a damaged MATLAB file"),
        (mat(GOOD_X[:100] + b"\xff" * 8 + GOOD_X[108:], GOOD_Y), "is a damaged MATLAB file"),
        (mat(HUGE), "is a damaged MATLAB file: an element of 4294967288 bytes where 16 are left"),
        (mat(GOOD_X), "has no numeric array y$"),
        (mat(), "has no numeric array X and no y$"),
        (mat(GOOD_X, matrix("y", DIGITS, array_class=4)), "has no numeric array y$"),
        (mat(GOOD_X, matrix("y", DIGITS, storage=16)), "y is not an array of real numbers"),
        (
            mat(GOOD_X, matrix("y", DIGITS, packed=False).replace(struct.pack("<ii", 4, 1), struct.pack("<ii", 5, 1))),
            "y is 5x1 but has 4 values",
        ),
        (
            mat(
                GOOD_X, matrix("y", DIGITS, packed=False).replace(struct.pack("<ii", 4, 1), struct.pack("<ii", -4, -1))
            ),
            "y is -4x-1 but has 4 values",
        ),
        (mat(matrix("X", X[:31]), GOOD_Y), r"X takes uint8 \(32,32,3,N\), got uint8 \(31, 32, 3, 4\)"),
        (mat(matrix("X", X.astype(np.float64), 9, 6), GOOD_Y), r"X takes uint8 \(32,32,3,N\), got float64"),
        (mat(GOOD_X, matrix("y", DIGITS[:3])), "holds 4 images but 3 labels"),
        (mat(GOOD_X, matrix("y", DIGITS + 1)), r"y takes integers from 1 to 10 \(the digit 0\), got 11"),
        (mat(GOOD_X, matrix("y", DIGITS - 1)), r"y takes integers from 1 to 10 \(the digit 0\), got 0"),
        (mat(GOOD_X, matrix("y", DIGITS / 2, 9, 6)), r"y takes integers from 1 to 10 \(the digit 0\), got 0.5"),
    ],
)
def test_damaged_svhn(tmp_path, content, message):
    path = write(tmp_path / "train_32x32.mat", content)
    assert str(path) in refused("svhn", "train", tmp_path, message)


@pytest.mark.filterwarnings("ignore:svhn test in")
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_mat_file_ends_in_one_line_wherever_the_damage_is(tmp_path, packed):
    path = tmp_path / "test_32x32.mat"
    whole = mat(matrix("y", DIGITS, packed=packed), matrix("X", X, packed=packed))
    generator = np.random.default_rng(1)
    places = np.concatenate([np.arange(124, 300), generator.integers(300, len(whole), 40)])
    messages = []
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(content)
        try:
            load("svhn", "test", tmp_path)
        except ValueError as error:
            messages.append(str(error))
    assert all(str(path) in message and "\n" not in message for message in messages)
    # A flipped bit of an unpacked pixel or of padding is no damage that shows; packed ones have zlib's checksum.
    assert len(messages) > (len(places) - 20 if packed else 30)


# TinyImageNet

WNIDS = ["n02", "n01", "n03"]


def picture(path, mode="RGB", size=(64, 64), colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(int(c) for c in RNG.integers(0, 256, 3)) if colour is None else colour
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


COLOURS = {"n01": (250, 5, 5), "n02": (5, 250, 5), "n03": (5, 5, 250)}


@pytest.fixture
def tiny(tmp_path):
    """Two training images and one test image for each of three classes, a gray JPEG in each split."""
    base = tmp_path / "tiny-imagenet-200"
    lines = []
    for i, wnid in enumerate(WNIDS):
        for j in range(2):
            mode = "L" if (wnid, j) == ("n03", 1) else "RGB"
            picture(base / "train" / wnid / "images" / f"{wnid}_{j}.JPEG", mode, colour=COLOURS[wnid])
        write(base / "train" / wnid / f"{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t63\t63\n".encode())
        picture(base / "val" / "images" / f"val_{i}.JPEG", "L" if wnid == "n01" else "RGB", colour=COLOURS[wnid])
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    write(base / "val" / "val_annotations.txt", "".join(lines).encode())
    write(base / "wnids.txt", "\n".join(WNIDS).encode())
    write(base / "words.txt", b"n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn09\tnobody\n")
    picture(base / "test" / "images" / "test_0.JPEG")
    return base


def close(image, colour):
    """JPEG keeps a flat colour to within two gray levels."""
    return (image.int() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 2


@pytest.mark.parametrize("nested", [True, False])
def test_tinyimagenet(tiny, nested):
    root = tiny.parent if nested else tiny
    with pytest.warns(UserWarning, match=r"tinyimagenet train in .* has 6 images, the published set 100000$"):
        train = load("tinyimagenet", "train", root)
    with pytest.warns(UserWarning, match=r"tinyimagenet test in .* has 3 images, the published set 10000$"):
        test = load("tinyimagenet", "test", root)
    assert train.class_names == test.class_names == ("goldfish", "bullfrog", "n03")
    assert train.images.shape == (6, 3, 64, 64)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for i, wnid in enumerate(("n01", "n01", "n02", "n02", "n03")):
        assert close(train.images[i], COLOURS[wnid])
    assert test.labels.tolist() == [1, 0, 2]
    assert close(test.images[0], COLOURS["n02"])
    assert close(test.images[2], COLOURS["n03"])
    for gray in (train.images[5], test.images[1]):
        assert torch.equal(gray[0], gray[1])
        assert torch.equal(gray[0], gray[2])
        assert 10 < gray.float().mean() < 100  # the luma of saturated blue and red


@pytest.mark.filterwarnings("ignore:tinyimagenet")
def test_tinyimagenet_subsets(tiny):
    for file in (tiny / "train" / "n02" / "images").iterdir():
        file.unlink()
    (tiny / "val" / "images" / "val_1.JPEG").unlink()
    (tiny / "words.txt").unlink()
    train, test = (load("tinyimagenet", split, tiny) for split in ("train", "test"))
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 2, 2], [1, 2])
    assert train.class_names == ("n01", "n02", "n03")


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def append(path, text):
    path.write_bytes(path.read_bytes() + text)


@pytest.mark.parametrize(
    ("damage", "split", "message"),
    [
        (lambda b: cut(b / "train/n01/images/n01_1.JPEG"), "train", "n01_1.JPEG is not an image that can be read: "),
        (lambda b: cut(b / "val/images/val_2.JPEG"), "test", "val_2.JPEG is not an image that can be read: "),
        (
            lambda b: write(b / "train/n01/images/n01_0.JPEG", b""),
            "train",
            "n01_0.JPEG is not an image that can be read",
        ),
        (
            lambda b: picture(b / "train/n02/images/n02_0.JPEG", size=(64, 60)),
            "train",
            r"n02_0.JPEG is 60x64 \(height x width\), expected 64x64 as n01_0.JPEG: all images share one size",
        ),
        (lambda b: picture(b / "train/n07/images/a.JPEG"), "train", "n07 is a class that is not in wnids.txt"),
        (lambda b: picture(b / "val/images/val_9.JPEG"), "test", "val_9.JPEG has no line in val_annotations.txt"),
        (
            lambda b: append(b / "val/val_annotations.txt", b"val_9.JPEG\tn44\t0\t0\t1\t1\n"),
            "test",
            "val_annotations.txt, line 4: takes a file and a wnid of wnids.txt, got 'val_9.JPEG",
        ),
        (lambda b: append(b / "val/val_annotations.txt", b"val_9.JPEG\n"), "test", "line 4: takes a file and a wnid"),
        (
            lambda b: append(b / "val/val_annotations.txt", b"val_0.JPEG\tn03\n"),
            "test",
            "line 4: a second label for 'val_0.JPEG'",
        ),
        (
            lambda b: append(b / "val/val_annotations.txt", b"\xff\xfe"),
            "test",
            "val_annotations.txt is not a text file",
        ),
        (lambda b: write(b / "wnids.txt", b""), "train", "n0. is a class that is not in wnids.txt"),
        (lambda b: [p.unlink() for p in b.glob("train/*/images/*")], "train", "holds no train images"),
    ],
)
@pytest.mark.filterwarnings("ignore:tinyimagenet")
def test_damaged_tinyimagenet(tiny, damage, split, message):
    damage(tiny)
    assert str(tiny) in refused("tinyimagenet", split, tiny, message)


def test_tinyimagenet_without_annotations(tiny):
    (tiny / "val" / "val_annotations.txt").unlink()
    message = "labels from .*val_annotations.txt, which is missing, or from folders named by their wnids in .*val$"
    refused("tinyimagenet", "test", tiny, message, FileNotFoundError)


@pytest.mark.filterwarnings("ignore:tinyimagenet")
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("annotated", [False, True])
def test_tinyimagenet_sorted_into_class_folders(tiny, deep, annotated):
    """As scripts for ImageFolder leave it: val/WNID or val/WNID/images, val/images empty or gone."""
    expected = load("tinyimagenet", "test", tiny)
    annotations = tiny / "val" / "val_annotations.txt"
    for line in annotations.read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        folder = tiny / "val" / wnid / "images" if deep else tiny / "val" / wnid
        folder.mkdir(parents=True, exist_ok=True)
        (tiny / "val" / "images" / name).rename(folder / name)
    if not annotated:
        annotations.unlink()
        (tiny / "val" / "images").rmdir()
    got = load("tinyimagenet", "test", tiny)
    assert got.labels.tolist() == [0, 1, 2]
    assert got.class_names == expected.class_names
    order = expected.labels.argsort()
    assert torch.equal(got.images, expected.images[order])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: picture(b / "val/n02/val_7.JPEG"), "val holds both n02 and 3 images in images, sort all or none"),
        (lambda b: (b / "val/images").rename(b / "val/n07"), "n07 is a class that is not in wnids.txt"),
        (
            lambda b: ((b / "val/images").rename(b / "val/n01"), [p.unlink() for p in b.glob("val/n01/*")]),
            "holds no te",
        ),
    ],
)
def test_damaged_sorted_tinyimagenet(tiny, damage, message):
    damage(tiny)
    refused("tinyimagenet", "test", tiny, message)


# Folders of images


@pytest.fixture
def pets(tmp_path):
    base = tmp_path / "pets"
    picture(base / "train" / "dog" / "1.png", colour=(1, 2, 3))
    picture(base / "train" / "dog" / "more" / "2.PNG", colour=(4, 5, 6))
    picture(base / "train" / "cat" / "1.bmp", colour=(7, 8, 9))
    picture(base / "train" / "cat" / ".hidden.png")
    write(base / "train" / "cat" / "notes.txt", b"no image")
    (base / "train" / ".cache").mkdir()
    picture(base / "val" / "dog" / "9.png", "L", colour=(50, 50, 50))
    return base


def test_folder(pets):
    name = f"folder:{pets}"
    train, test = load(name, "train"), load(name, "test")
    assert (train.class_names, train.num_classes) == (("cat", "dog"), 2)
    assert train.labels.tolist() == [0, 1, 1]
    assert train.images[:, :, 5, 7].tolist() == [[7, 8, 9], [1, 2, 3], [4, 5, 6]]
    assert train.images.shape == (3, 3, 64, 64)
    # The classes are those of train, though val has fewer.
    assert (test.labels.tolist(), test.num_classes) == ([1], 2)
    assert test.images.unique().tolist() == [50]
    assert (train.name, test.source) == (name, str(pets / "val"))
    assert torch.equal(load("folder:pets", "train", pets.parent).images, train.images)


def test_images_that_were_saved_from_0_to_1_are_named(pets):
    """Of every source, as `dataset_of` makes all of them: as 8-bit images they would be black within 1/255."""
    for path in (pets / "train").rglob("*"):
        if path.suffix.lower() in (".png", ".bmp"):
            picture(path, colour=(0, 1, 1))
    with pytest.warns(UserWarning, match=r"train images of folder:.* hold no gray level above 1 of 255.* by 255 first"):
        load(f"folder:{pets}", "train")
    load(f"folder:{pets}", "test")


def test_folder_prefers_test_to_val_and_needs_no_train(pets):
    picture(pets / "test" / "cat" / "1.png", colour=(0, 0, 9))
    assert load(f"folder:{pets}", "test").labels.tolist() == [0]
    (pets / "train").rename(pets / "other")
    alone = load(f"folder:{pets}", "test")
    assert (alone.class_names, alone.labels.tolist()) == (("cat",), [0])


def test_folder_of_many_sizes_takes_one_by_name(pets):
    wide = picture(pets / "train" / "cat" / "wide.png", size=(100, 40))
    with Image.open(wide) as image:
        left = image.convert("RGB")
    left.paste((200, 0, 0), (0, 0, 22, 40))  # left out by a crop at the centre; columns 30 to 70 stay
    left.save(wide)
    name = f"folder:{pets}"
    message = refused(name, "train", None, r"wide.png is 40x100 \(height x width\), expected 64x64 as .*1.bmp: ")
    assert f"{name}@64 scales and crops them" in message
    for size in (16, 64):
        dataset = load(f"{name}@{size}", "train")
        assert dataset.images.shape == (4, 3, size, size)
        assert len(dataset.images[1].flatten(1).unique(dim=1)[0]) == 1
    assert torch.equal(
        load(f"{name}@64", "train").images[[0, 2, 3]],
        load(name, "test")
        .images[:0]
        .new_tensor([[7, 8, 9], [1, 2, 3], [4, 5, 6]])
        .view(3, 3, 1, 1)
        .expand(-1, -1, 64, 64),
    )
    # Test images too have the size of the training images, unless a size is given.
    picture(pets / "val" / "dog" / "9.png", size=(32, 32))
    refused(name, "test", None, r"9.png is 32x32 \(height x width\), expected 64x64 as .*train/cat/1.bmp")
    assert load(f"{name}@32", "test").images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("damage", "split", "message"),
    [
        (lambda b: picture(b / "val/bird/1.png"), "test", "bird is a class that is not in .*train$"),
        (lambda b: [p.unlink() for p in b.glob("val/*/*")], "test", "holds no test images"),
        (lambda b: cut(picture(b / "train/cat/0.png", colour=None)), "train", "0.png is not an image"),
        (
            lambda b: write(b / "train/dog/0.jpg", b"no"),
            "train",
            "0.jpg is not an image that can be read: cannot identify",
        ),
        (lambda b: Image.fromarray(np.zeros((64, 64), np.uint16)).save(b / "train/dog/0.png"), "train", "mode I;16"),
    ],
)
def test_damaged_folder(pets, damage, split, message):
    damage(pets)
    assert str(pets) in refused(f"folder:{pets}", split, None, message)


def test_folder_sizes(pets):
    refused(f"folder:{pets}@0", "train", None, "a size takes an integer >= 1, got 0$")
    refused(f"folder:{pets}@big", "train", None, "@big not found", FileNotFoundError)


def test_images_of_every_kind_come_out_as_rgb(tmp_path):
    source = Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    for mode in ("RGB", "L", "1", "P", "RGBA", "LA"):
        path = tmp_path / f"{mode}.png"
        source.convert(mode).save(path)
        assert image_size(path) == (6, 9)
        expected = np.asarray(source.convert(mode).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(read_images([path], (6, 9))[0].numpy(), expected)
    assert read_images([], (6, 9)).shape == (0, 3, 6, 9)


# Downloads


@pytest.mark.filterwarnings("ignore:.* has 4 images")
def test_cifar100_and_svhn_download_through_torchvision(nowhere, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    calls = []

    def url(url, root, name, md5):
        calls.append((url, root, name, len(md5)))
        if name.endswith(".mat"):
            write(nowhere / "named" / name, mat(GOOD_X, GOOD_Y))
            return
        with tarfile.open(nowhere / "named" / name, "w:gz") as tar:
            batch = tarfile.TarInfo("cifar-100-python/test")
            batch.size = len(cifar100_pickle())
            tar.addfile(batch, io.BytesIO(cifar100_pickle()))

    (nowhere / "named").mkdir()
    monkeypatch.setattr(datasets.utils, "download_url", url)
    named = str(nowhere / "named")
    for _ in range(2):
        assert load("cifar100", "test", download=True).labels.tolist() == FINE
        assert load("svhn", "test", download=True).labels.tolist() == [0, 1, 9, 3]
    assert calls[0] == (datasets.CIFAR100.url, named, "cifar-100-python.tar.gz", 32)
    assert re.fullmatch(r"https?://.*/test_32x32.mat", calls[1][0])
    assert calls[1][1:] == (named, "test_32x32.mat", 32)
    assert len(calls) == 2

    def broken(*_):
        raise OSError("no route\nto host")

    monkeypatch.setattr(datasets.utils, "download_url", broken)
    with pytest.raises(OSError, match=r"^download of SVHN to .*/empty failed: no route$"):
        load("svhn", "train", nowhere / "empty", download=True)
    for name in ("tinyimagenet", "folder:pictures"):
        with pytest.raises(FileNotFoundError, match="download"):
            load(name, "train", download=True)
    assert not os.path.exists(nowhere / "empty")


def test_a_name_in_wnids_leads_nowhere_else(tiny, tmp_path):
    """Neither up nor to an absolute path: the folder of a class lies in train."""
    picture(tmp_path / "elsewhere" / "images" / "a.JPEG")
    for name in ("../../elsewhere", str(tmp_path / "elsewhere"), "..", ".", "n01/../n02", "n\0"):
        (tiny / "wnids.txt").write_text("\n".join([*WNIDS, name]))
        message = refused("tinyimagenet", "train", tiny, r"wnids.txt must hold names of folders, got ")
        assert repr(name)[:20] in message


def test_links_that_lead_back_are_not_followed(pets):
    expected = load("folder:pets", "train", pets.parent)
    cat, dog = pets / "train" / "cat", pets / "train" / "dog"
    (cat / "back").symlink_to(pets, target_is_directory=True)
    (cat / "self").symlink_to(cat, target_is_directory=True)
    (dog / "deep").mkdir()
    (dog / "deep" / "up").symlink_to("..", target_is_directory=True)
    assert torch.equal(load("folder:pets", "train", pets.parent).images, expected.images)


def test_links_to_other_folders_are_followed(pets, tmp_path):
    before = len(load("folder:pets", "train", pets.parent))
    picture(tmp_path / "more" / "one.png")
    (pets / "train" / "cat" / "more").symlink_to(tmp_path / "more", target_is_directory=True)
    assert len(load("folder:pets", "train", pets.parent)) == before + 1

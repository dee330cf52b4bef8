"""PackedEpsilon: against numpy.packbits; indexing, moving, errors."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import EPS, EPS_LOW, assert_error
from hypothesis import given
from hypothesis import strategies as st

from part_fast import PackedEpsilon

SHAPES = [
    (2, 1, 8, 8),
    (3, 3, 5, 7),
    (1, 1, 1, 1),
    (1, 1, 1, 31),
    (2, 3, 33, 1),
    (1, 1, 33, 31),
    (0, 1, 4, 4),
    (2, 1, 0, 4),
]


def random_mask(shape):
    return torch.rand(shape) < 0.4


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_numpys(shape):
    mask = random_mask(shape)
    packed = PackedEpsilon.pack(mask, EPS, EPS_LOW)
    expected = np.packbits(mask.flatten(2).numpy(), axis=2, bitorder="little")
    assert packed.bits.dtype == torch.uint8
    assert packed.bits.is_contiguous()
    assert (packed.bits.numpy() == expected).all()
    assert packed.bits.shape == expected.shape == (*shape[:2], -(-shape[2] * shape[3] // 8))
    assert packed.nbytes == expected.nbytes
    assert len(packed) == shape[0]
    assert packed.shape == shape
    assert packed.size == shape[2:]
    assert packed.device == mask.device


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_and_mask(shape):
    mask = random_mask(shape)
    packed = PackedEpsilon.pack(mask, EPS, EPS_LOW)
    dense = packed.dense()
    assert dense.dtype == torch.float32
    assert (dense.numpy() == np.where(mask.numpy(), np.float32(EPS), np.float32(EPS_LOW))).all()
    assert dense.shape == shape
    assert torch.equal(packed.mask(), mask)


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (1, 1, 1, 3)])
def test_bits_past_the_last_pixel_are_not_read(shape):
    packed = PackedEpsilon.pack(random_mask(shape), EPS, EPS_LOW)
    bits = packed.bits.clone()
    bits[..., -1] |= 0xFF & ~((1 << shape[2] * shape[3] % 8) - 1)
    assert not torch.equal(bits, packed.bits)
    assert torch.equal(PackedEpsilon(bits, shape[2:], EPS, EPS_LOW).dense(), packed.dense())


def test_dtype_of_dense_does_not_follow_the_default():
    packed = PackedEpsilon.pack(random_mask((2, 1, 3, 3)), EPS, EPS_LOW)
    expected = packed.dense()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(packed.dense(), expected)
        assert packed.dense().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_mask_of_any_layout():
    mask = random_mask((2, 3, 4, 5))
    expected = PackedEpsilon.pack(mask, 1, 0).bits
    assert torch.equal(PackedEpsilon.pack(mask.contiguous(memory_format=torch.channels_last), 1, 0).bits, expected)
    one = mask[:, :1]
    assert torch.equal(
        PackedEpsilon.pack(one.expand(2, 3, 4, 5), 1, 0).bits, PackedEpsilon.pack(one.repeat(1, 3, 1, 1), 1, 0).bits
    )
    strided = torch.empty(2, expected.shape[1], 2 * expected.shape[2], dtype=torch.uint8)[..., ::2].copy_(expected)
    assert PackedEpsilon(strided, (4, 5), 1, 0).bits.is_contiguous()
    assert torch.equal(PackedEpsilon(strided, (4, 5), 1, 0).mask(), mask)


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        3,
        slice(1, 3),
        slice(None, None, 2),
        [2, 0, 2],
        torch.tensor([4, 1]),
        torch.tensor([True, False, True, True, False]),
        torch.tensor([], dtype=torch.int64),
        slice(0, 0),
    ],
    ids=repr,
)
def test_indexing(index):
    packed = PackedEpsilon.pack(random_mask((5, 2, 3, 4)), EPS, EPS_LOW)
    chosen = packed[index]
    expected = packed.dense()[index]
    assert torch.equal(chosen.dense(), expected if expected.ndim == 4 else expected[None])
    assert (chosen.size, chosen.eps, chosen.eps_low) == (packed.size, packed.eps, packed.eps_low)


def test_index_select():
    packed = PackedEpsilon.pack(random_mask((5, 1, 3, 4)), EPS, EPS_LOW)
    index = torch.tensor([3, 3, 0])
    expected = packed.dense().index_select(0, index)
    assert torch.equal(packed.index_select(index).dense(), expected)
    assert torch.equal(packed.index_select(0, index).dense(), expected)
    with pytest.raises(ValueError, match=r"^dim must be 0"):
        packed.index_select(1, index)


def test_iterating_ends():
    packed = PackedEpsilon.pack(random_mask((3, 1, 2, 2)), EPS, EPS_LOW)
    samples = list(packed)
    assert len(samples) == 3
    assert torch.equal(torch.cat([one.dense() for one in samples]), packed.dense())


def test_to_copies_and_pickles():
    packed = PackedEpsilon.pack(random_mask((3, 1, 5, 5)), EPS, EPS_LOW)
    assert packed.to("meta").device.type == "meta"
    assert packed.to("meta").shape == packed.shape
    for other in (packed.to("cpu"), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other.bits, packed.bits)
        assert (other.size, other.eps, other.eps_low) == (packed.size, packed.eps, packed.eps_low)
    assert "shape=(3, 1, 5, 5)" in repr(packed)


def test_frozen():
    packed = PackedEpsilon.pack(random_mask((1, 1, 2, 2)), EPS, EPS_LOW)
    with pytest.raises(AttributeError):
        packed.eps = 1.0


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 9), st.integers(0, 9)),
    pair=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**31),
)
def test_pack_and_mask_are_inverse(shape, pair, seed):
    torch.manual_seed(seed)
    mask = random_mask(shape)
    packed = PackedEpsilon.pack(mask, max(pair), min(pair))
    assert torch.equal(packed.mask(), mask)
    assert (packed.dense().numpy() == np.where(mask.numpy(), np.float32(max(pair)), np.float32(min(pair)))).all()


@pytest.mark.parametrize(
    ("argument", "value", "error", "got"),
    [
        ("bits", None, TypeError, "NoneType"),
        ("bits", torch.zeros(2, 1, 2), TypeError, "torch.float32"),
        ("bits", torch.zeros(2, 1, 2, dtype=torch.bool), TypeError, "torch.bool"),
        ("bits", torch.zeros(2, 2, dtype=torch.uint8), ValueError, "(2, 2)"),
        ("bits", torch.zeros(2, 1, 3, dtype=torch.uint8), ValueError, "(2, 1, 3)"),
        ("size", None, TypeError, "None"),
        ("size", 4, TypeError, "4"),
        ("size", (4, 4, 4), TypeError, "(4, 4, 4)"),
        ("size", (4.0, 4), TypeError, "float"),
        ("size", (-4, 4), ValueError, "-4"),
        ("eps", -1.0, ValueError, "-1"),
        ("eps", float("nan"), ValueError, "nan"),
        ("eps", torch.tensor(0.5), TypeError, "shape ()"),
        ("eps_low", None, TypeError, "NoneType"),
        ("eps_low", -1.0, ValueError, "-1"),
        ("eps_low", 0.75, ValueError, "0.75"),
    ],
)
def test_bad_input(argument, value, error, got):
    good = {"bits": torch.zeros(2, 1, 2, dtype=torch.uint8), "size": (4, 4), "eps": 0.5, "eps_low": 0.25}
    PackedEpsilon(**good)
    assert_error(lambda: PackedEpsilon(**{**good, argument: value}), argument, error, got)


@pytest.mark.parametrize(
    ("argument", "value", "error", "got"),
    [
        ("mask", None, TypeError, "NoneType"),
        ("mask", torch.zeros(1, 1, 2, 2), TypeError, "torch.float32"),
        ("mask", torch.zeros(1, 1, 2, 2, dtype=torch.uint8), TypeError, "torch.uint8"),
        ("mask", torch.zeros(1, 2, 2, dtype=torch.bool), ValueError, "(1, 2, 2)"),
        ("eps", -1.0, ValueError, "-1"),
        ("eps_low", 0.75, ValueError, "0.75"),
    ],
)
def test_bad_input_to_pack(argument, value, error, got):
    good = {"mask": torch.zeros(1, 1, 2, 2, dtype=torch.bool), "eps": 0.5, "eps_low": 0.25}
    assert_error(lambda: PackedEpsilon.pack(**{**good, argument: value}), argument, error, got)


@pytest.mark.parametrize(
    ("index", "error", "got"),
    [
        ("0", TypeError, "'0'"),
        (None, TypeError, "None"),
        (1.0, TypeError, "1.0"),
        ((0, 0), TypeError, "(0, 0)"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "tensor"),
        (3, IndexError, "3"),
        (-4, IndexError, "-4"),
    ],
)
def test_bad_index(index, error, got):
    packed = PackedEpsilon.pack(random_mask((3, 1, 2, 2)), EPS, EPS_LOW)
    assert_error(lambda: packed[index], "index", error, got)

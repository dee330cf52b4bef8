"""PerturbationBank: what is kept of a pixel is found again at every crop and flip, in any number of processes."""

import pytest
import torch

from part_fast import PerturbationBank, distributed
from part_fast.config import TrainConfig
from part_fast.data.memory import Augmentation, draw_augmentation
from part_fast.ops import eps_step_
from part_fast.training.epoch import epoch_order, refuse_uneven

EPS = 8 / 255
# Every crop that padding by 4 has, straight and flipped: a sample for each.
CROPS = [(dy, dx, flip) for dy in range(-4, 5) for dx in range(-4, 5) for flip in (False, True)]
ALL = Augmentation(
    torch.tensor([dy for dy, _, _ in CROPS]),
    torch.tensor([dx for _, dx, _ in CROPS]),
    torch.tensor([flip for *_, flip in CROPS]),
)
N, C, SIDE = len(CROPS), 2, 7


def bank_of(samples=N, **options):
    return PerturbationBank(samples, (C, SIDE, SIDE), EPS, **options)


def source(place, row, column):
    """The stored pixel that an augmented image shows at (row, column); None outside."""
    dy, dx, flip = place
    row, column = row + dy, (SIDE - 1 - column if flip else column) + dx
    return (row, column) if 0 <= row < SIDE and 0 <= column < SIDE else None


def store(bank, view, delta):
    """Write delta (N,C,H,W) to the bank as the last step of an attack does, which moves nothing itself."""
    x = torch.full_like(delta, 0.5)
    eps_step_(
        x + delta, torch.zeros_like(x), x, 1.0, None, None, alpha=0.0, bank=view.bank, places=view.places, scale=EPS
    )


def test_there_are_81_crops():
    assert N == 162


def test_what_is_read_is_moved_as_its_image_for_every_crop_and_flip():
    bank = bank_of()
    found = bank.at(torch.arange(N), ALL).start(torch.zeros(N, C, SIDE, SIDE), 1.0, None)
    expected = torch.zeros(N, C, SIDE, SIDE)
    for n, place in enumerate(CROPS):
        for row in range(SIDE):
            for column in range(SIDE):
                pixel = source(place, row, column)
                if pixel is not None:
                    expected[n, :, row, column] = bank.values[n, :, pixel[0], pixel[1]].float() * (EPS / 127)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (found != 0).float().mean() > 0.4


def test_what_is_written_is_moved_back_for_every_crop_and_flip():
    bank = bank_of()
    before, places = bank.values.clone(), torch.arange(N)
    # Levels of the bank themselves, so that each is found again whatever the last bit of x + delta is.
    levels = torch.randint(-127, 128, (N, C, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    store(bank, bank.at(places, ALL), levels * (EPS / 127))
    expected = before.clone()
    for n, place in enumerate(CROPS):
        for row in range(SIDE):
            for column in range(SIDE):
                pixel = source(place, row, column)
                if pixel is not None:
                    expected[n, :, pixel[0], pixel[1]] = levels[n, :, row, column].to(torch.int8)
    assert torch.equal(bank.values, expected)
    cut = expected[0] == before[0]  # crop (-4, -4): a corner of 3x3 was seen, the rest keeps what it had
    assert cut.float().mean() > 0.7


def test_an_image_and_its_perturbation_go_the_same_way():
    """Augmented as images are, by Augmentation itself: a bank and a set of images with the same values agree."""
    bank = bank_of(40)
    indices = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:20]
    drawn = draw_augmentation(20, generator=torch.Generator().manual_seed(1))
    moved = drawn.apply(bank.values[indices].float() * (EPS / 127))
    found = bank.at(indices, drawn).start(torch.zeros(20, C, SIDE, SIDE), 1.0, None)
    torch.testing.assert_close(found, moved, rtol=1e-6, atol=0)
    assert torch.equal(bank.at(indices, None).places[:, 0], indices)


def test_rounding_is_at_most_half_a_level():
    bank = bank_of(8)
    view = bank.at(torch.arange(8), None)
    delta = (2 * torch.rand(8, C, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) - 1) * EPS
    store(bank, view, delta)
    found = view.start(torch.zeros_like(delta), 1.0, None)
    # Half a level, eps / 254, and the rounding of 0.5 + delta in float32.
    assert (found - delta).abs().max() <= EPS / 254 + 1e-7
    assert (found - delta).abs().max() > 0.9 * EPS / 254, "or it keeps more than a byte"


def test_first_values_are_uniform_seeded_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    bank, again, other = (bank_of(2000, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(bank.values, again.values)
    assert (bank.values != other.values).float().mean() > 0.99
    counts = torch.bincount(bank.values.flatten().long() + 128, minlength=256)
    assert counts[0] == 0  # -128, which is no level
    # 196,000 values in 255 levels: each count is Poisson with mean 769; six standard deviations, 28 each.
    assert ((counts[1:] - 769).abs() < 170).all()
    again.reset(1)
    assert torch.equal(again.values, other.values)
    again.reset(0)
    assert torch.equal(again.values, bank.values)


def test_size():
    assert PerturbationBank(500, (3, 32, 32), EPS).values.nbytes == 500 * 3072
    assert len(bank_of(5)) == 5


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def process(monkeypatch):
    """process(rank, size) makes this the rank-th of so many."""

    def be(rank, size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "size", lambda: size)

    return be


@pytest.mark.parametrize("samples", [12, 13, 2500])
def test_shards_hold_what_one_bank_holds(samples, process):
    whole = bank_of(samples, seed=3)
    found = torch.zeros_like(whole.values)
    for rank in range(3):
        process(rank, 3)
        shard = bank_of(samples, seed=3)
        assert len(shard.values) == len(range(rank, samples, 3))
        found[rank::3] = shard.values
    assert torch.equal(found, whole.values)


def test_a_shard_knows_its_samples_by_their_index(process):
    whole = bank_of(13, seed=3)
    process(1, 3)
    shard = bank_of(13, seed=3)
    indices = torch.tensor([10, 1, 7])
    x = torch.zeros(3, C, SIDE, SIDE)
    for view in (shard.at(indices, None), bank_of(13, seed=3).at(indices, None)):
        expected = whole.values[indices].float() * (EPS / 127)
        torch.testing.assert_close(view.start(x, 1.0, None), expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"indices must be of process 1 of 3, which keeps 1, 4, \.\.\., got 2"):
        shard.at(torch.tensor([1, 2]), None)
    # Where values are not read, as on a GPU, such a sample's place is in no bank.
    shard._check_indices = lambda indices: None
    assert shard.at(torch.tensor([1, 2, 4]), None).places[:, 0].tolist() == [0, -1, 1]


@pytest.mark.parametrize(("before", "now"), [(1, 1), (2, 2), (1, 3), (3, 1), (2, 3)])
def test_a_checkpoint_of_any_number_of_processes_is_taken_over(before, now, process):
    whole = bank_of(13, seed=5)
    shards = [whole.values[rank::before].clone() for rank in range(before)]
    for rank in range(now):
        process(rank, now)
        bank = bank_of(13, seed=6)
        bank.load(shards)
        assert torch.equal(bank.values, whole.values[rank::now])


@pytest.mark.parametrize(("n", "size"), [(12, 3), (13, 3), (14, 3), (5, 5), (7, 1)])
def test_each_process_goes_over_its_own_samples(n, size, process):
    config = TrainConfig(attack="pgi")
    orders = []
    for rank in range(size):
        process(rank, size)
        orders.append(epoch_order(n, config, 0))
        assert set(orders[-1].tolist()) == set(range(rank, n, size))
        assert not torch.equal(epoch_order(n, config, 1), orders[-1]) or n // size < 4
        if size > 1:
            assert torch.equal(epoch_order(n, config, 0), orders[-1])
    assert {len(order) for order in orders} == {-(-n // size)}, "or one would wait for the others for ever"


def test_the_order_of_other_attacks_is_what_it_was(process, monkeypatch):
    monkeypatch.setattr(distributed, "same_", lambda value: value.copy_(torch.arange(len(value)).flip(0)))
    process(1, 3)
    assert epoch_order(10, TrainConfig(), 0).tolist() == [8, 5, 2, 9]


def test_a_sample_twice_in_a_batch_is_refused(process):
    process(0, 2)
    refuse_uneven(TrainConfig(attack="pgi", batch_size=32), 64, 0)
    refuse_uneven(TrainConfig(attack="pgi", batch_size=16), 63, 0)  # twice in the epoch, in two batches
    with pytest.raises(ValueError, match="train_size must be a multiple of the 2 processes with attack pgi and one ba"):
        refuse_uneven(TrainConfig(attack="pgi", batch_size=32), 63, 0)
    with pytest.raises(
        ValueError, match="extra must hold at least 46 images, as many as an epoch takes of them, with att"
    ):
        refuse_uneven(TrainConfig(attack="pgi", batch_size=16), 64, 45)
    refuse_uneven(TrainConfig(attack="pgi", batch_size=16), 64, 46)
    process(0, 1)
    refuse_uneven(TrainConfig(attack="pgi", batch_size=64), 63, 0)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, (3, 8, 8), EPS), "samples must be >= 1, got 0"),
        ((4, (8, 8), EPS), r"shape must be \(C,H,W\), got \(8, 8\)"),
        ((4, (3, 8, 0), EPS), "shape must be >= 1, got 0"),
        ((4, 3, EPS), r"shape must be \(C,H,W\), got 3"),
        ((4, (3, 8, 8), 0.0), "eps must be > 0 for a bank of perturbations, got 0"),
        ((4, (3, 8, 8), float("nan")), "eps must be finite"),
    ],
)
def test_a_bank_that_cannot_be(arguments, says):
    with pytest.raises(ValueError, match=says):
        PerturbationBank(*arguments)


def test_fewer_samples_than_processes(process):
    process(0, 4)
    with pytest.raises(ValueError, match="samples must be at least one for each of 4 processes, got 3"):
        bank_of(3)


@pytest.mark.parametrize(
    ("indices", "augmentation", "error", "says"),
    [
        ([0, 1], None, TypeError, r"indices must be int64 \(B,\), got list"),
        (torch.tensor([0.0]), None, TypeError, r"indices must be int64 \(B,\), got torch.float32 \(1,\)"),
        (torch.tensor([[0]]), None, TypeError, r"indices must be int64 \(B,\), got torch.int64 \(1, 1\)"),
        (torch.tensor([0, 9]), None, ValueError, r"indices must be in \[0, 9\), got values from 0 to 9"),
        (torch.tensor([0, -1]), None, ValueError, r"indices must be in \[0, 9\), got values from -1 to 0"),
        (torch.tensor([4, 4]), None, ValueError, "indices must be of different samples, got one twice"),
        (
            torch.tensor([0, 1]),
            draw_augmentation(3),
            ValueError,
            "augmentation must be drawn for the 2 samples of the batch, got one for 3",
        ),
        (
            torch.tensor([0]),
            "crop",
            TypeError,
            "augmentation must be the Augmentation that was drawn, or None, got str",
        ),
        (torch.arange(2, device="meta"), None, ValueError, "indices must be on the device of the bank, cpu, got meta"),
    ],
)
def test_places_that_cannot_be(indices, augmentation, error, says):
    with pytest.raises(error, match=says):
        bank_of(9).at(indices, augmentation)


def test_the_crop_must_be_said():
    with pytest.raises(TypeError, match="augmentation"):
        bank_of(9).at(torch.tensor([0]))


@pytest.mark.parametrize(("shards", "got"), [([], "none"), (None, "NoneType"), (torch.zeros(9, 2), "Tensor")])
def test_no_list_of_values_is_no_checkpoint(shards, got):
    bank = bank_of(9)
    before = bank.values.clone()
    with pytest.raises(TypeError, match=f"shards must be a list of the values of each process, got {got}$"):
        bank.load(shards)
    assert torch.equal(bank.values, before)


@pytest.mark.parametrize(
    "shards",
    [
        [torch.zeros(8, C, SIDE, SIDE, dtype=torch.int8)],
        [torch.zeros(9, C, SIDE, SIDE + 1, dtype=torch.int8)],
        [torch.zeros(9, C, SIDE, SIDE)],
        [torch.zeros(9, C, SIDE, SIDE, dtype=torch.int8)] * 2,
        [None],
    ],
)
def test_a_bank_of_another_data_set_is_refused_before_it_is_loaded(shards):
    bank = bank_of(9)
    before = bank.values.clone()
    with pytest.raises(ValueError, match=r"perturbations of another data set: process 0 must have int8 \([59], 2, 7"):
        bank.load(shards)
    assert torch.equal(bank.values, before)

"""MaskBank: what is looked up is the mask of the very pixels that the augmented image shows."""

import pytest
import torch
from golden_attack import golden_net

from part_fast import CamBudget
from part_fast.budgets.bank import MaskBank
from part_fast.data.memory import Augmentation, draw_augmentation, to_float

IMAGES = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def filled(rule="quantile:0.4", batch_size=7):
    budget = CamBudget(golden_net(), 0.3, 0.1, rule=rule, target_layer="relu2")
    bank = MaskBank(20, (16, 16), budget.channels, 0.3, 0.1)
    bank.fill(budget, IMAGES, batch_size)
    return bank, budget(to_float(IMAGES))


@pytest.mark.parametrize("rule", ["zscore", "released", "quantile:0.4"])
def test_lookup_is_the_budgets_map(rule):
    bank, eps = filled(rule)
    indices = torch.tensor([19, 0, 7, 7])
    # Another batch size may round the CAM otherwise: single pixels at the threshold.
    assert (bank.lookup(indices) != eps[indices]).float().mean() < 0.005


def test_every_crop_and_flip_shows_the_mask_of_its_source_pixels():
    bank, _ = filled()
    eps = bank.lookup(torch.arange(20))
    padded = torch.nn.functional.pad(eps, (4, 4, 4, 4), value=0.1)
    for dy in range(-4, 5):
        for dx in range(-4, 5):
            for flip in (False, True):
                drawn = Augmentation(torch.full((20,), dy), torch.full((20,), dx), torch.full((20,), flip))
                expected = padded[:, :, dy + 4 : dy + 20, dx + 4 : dx + 20]
                expected = expected.flip(3) if flip else expected
                assert torch.equal(bank.lookup(torch.arange(20), drawn), expected)


def test_mask_follows_its_image():
    """Marks the masked pixels in the images themselves: augmented alike, both must show the same places."""
    bank, _ = filled()
    marked = (bank.lookup(torch.arange(20)) > 0.2).expand(-1, 3, -1, -1).to(torch.uint8) * 255
    indices = torch.randperm(20)
    drawn = draw_augmentation(20)
    shown = drawn.apply(marked[indices])
    assert torch.equal(bank.lookup(indices, drawn) > 0.2, shown[:, :1] > 0.5)


def test_empty_until_filled_and_size():
    bank = MaskBank(50_000, (32, 32), 1, 8 / 255, 7 / 255)
    assert bank.bits.nbytes == 6_400_000
    assert (bank.lookup(torch.tensor([3])) == torch.tensor(7 / 255)).all()


def test_progress_counts_every_image():
    counted = []
    budget = CamBudget(golden_net(), 0.3, 0.1, target_layer="relu2")
    MaskBank(20, (16, 16), 1, 0.3, 0.1).fill(budget, IMAGES, 8, counted.append)
    assert counted == [8, 8, 4]


def test_bits_survive_a_checkpoint(tmp_path):
    bank, _ = filled()
    torch.save(bank.bits, tmp_path / "bits.pt")
    other = MaskBank(20, (16, 16), 1, 0.3, 0.1)
    other.load_bits(torch.load(tmp_path / "bits.pt", weights_only=True))
    assert torch.equal(other.lookup(torch.arange(20)), bank.lookup(torch.arange(20)))


@pytest.mark.parametrize(
    ("changes", "batch_size", "says"),
    [
        (
            {"eps": 0.25},
            7,
            r"bank's eps, eps_low and channels, \(0\.3, 0\.1, 1\), got \(0\.25, 0\.1, 1\)",
        ),
        ({"eps_low": 0.0}, 7, r"got \(0\.3, 0\.0, 1\)"),
        ({"rule": "released"}, 7, r"got \(0\.3, 0\.1, 3\)"),
        ({"clip": ([-1.0] * 3, [2.0] * 3)}, 7, r"budget must have clip \(0, 1\), the range that stored images become"),
        ({"clip": (-1, 1)}, 7, "budget must have clip"),
        ({}, -1, "batch_size must be >= 1, got -1"),
    ],
)
def test_a_budget_of_something_else_leaves_the_bank_as_it_was(changes, batch_size, says):
    bank, _ = filled()
    before = bank.bits.clone()
    budget = CamBudget(golden_net(), **{"eps": 0.3, "eps_low": 0.1, "target_layer": "relu2", **changes})
    with pytest.raises(ValueError, match=says):
        bank.fill(budget, IMAGES, batch_size)
    assert torch.equal(bank.bits, before)
    assert before.any()


def test_errors():
    bank = MaskBank(20, (16, 16), 1, 0.3, 0.1)
    budget = CamBudget(golden_net(), 0.3, 0.1, target_layer="relu2")
    with pytest.raises(ValueError, match="images must be uint8"):
        bank.fill(budget, to_float(IMAGES))
    with pytest.raises(ValueError, match=r"images must have shape \(20, 'C', 16, 16\), got \(19, 3, 16, 16\)"):
        bank.fill(budget, IMAGES[1:])
    with pytest.raises(ValueError, match="rule must be one of"):
        bank.fill(CamBudget(golden_net(), rule="soft", target_layer="relu2"), IMAGES)
    with pytest.raises(ValueError, match=r"bits must be uint8 \(20, 1, 32\), got"):
        bank.load_bits(torch.zeros(2, 1, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match="bits must be a Tensor, got NoneType"):
        bank.load_bits(None)
    with pytest.raises(ValueError, match="eps_low must be <= eps"):
        MaskBank(20, (16, 16), 1, 0.1, 0.3)
    with pytest.raises(TypeError, match=r"size must be \(H, W\), got 16"):
        MaskBank(20, 16, 1, 0.3, 0.1)
    for index in (20, -1):
        with pytest.raises(ValueError, match=r"indices must be in \[0, 20\), got values from -?[0-9]+ to [0-9]+"):
            bank.lookup(torch.tensor([3, index]))
    for indices in ([1], torch.tensor([1.0]), torch.tensor([[1]])):
        with pytest.raises(TypeError, match=r"indices must be int64 \(B,\), got "):
            bank.lookup(indices)

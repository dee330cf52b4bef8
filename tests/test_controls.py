"""Controls keep a map's amounts and break its meaning, each in its own way."""

import pytest
import torch
from golden_attack import EXPECTED, golden_net

from part_fast import CamBudget
from part_fast.budgets.controls import CONTROLS, control_map


@pytest.fixture(params=[1, 3], ids=["M=1", "M=3"])
def maps(request):
    mask = torch.rand(6, request.param, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.3
    return torch.where(mask, 0.3, 0.1)


def test_none(maps):
    assert control_map(maps, "none", 0.3, 0.1) is maps


def test_permuted_gives_everybody_another_image_of_the_batch(maps):
    for seed in range(20):
        torch.manual_seed(seed)
        got = control_map(maps, "permuted", 0.3, 0.1)
        origin = [[torch.equal(got[i], maps[j]) for j in range(6)].index(True) for i in range(6)]
        assert sorted(origin) == list(range(6))
        assert all(i != j for i, j in enumerate(origin))
    assert torch.equal(control_map(maps[:1], "permuted", 0.3, 0.1), maps[:1])


def test_random_keeps_the_number_of_pixels(maps):
    torch.manual_seed(0)
    got = control_map(maps, "random", 0.3, 0.1)
    assert torch.equal((got > 0.2).sum((2, 3)), (maps > 0.2).sum((2, 3)))
    assert not torch.equal(got, maps)
    assert not torch.equal(control_map(maps, "random", 0.3, 0.1), got)


def test_random_goes_anywhere():
    torch.manual_seed(0)
    one = torch.full((4000, 1, 2, 2), 0.1)
    one[:, :, 0, 0] = 0.3
    share = (control_map(one, "random", 0.3, 0.1) > 0.2).float().mean(0).flatten()
    # Standard error of a share of 1/4 in 4,000 draws is 0.007; five of them.
    assert (share - 0.25).abs().max() < 0.035


def test_inverted(maps):
    got = control_map(maps, "inverted", 0.3, 0.1)
    torch.testing.assert_close(got, torch.where(maps > 0.2, 0.1, 0.3))


def test_uniform_is_each_images_mean(maps):
    got = control_map(maps, "uniform", 0.3, 0.1)
    torch.testing.assert_close(got.mean((1, 2, 3)), maps.mean((1, 2, 3)))
    assert (got.amax((1, 2, 3)) == got.amin((1, 2, 3))).all()


@pytest.mark.parametrize("control", CONTROLS)
def test_budget_applies_it(control):
    plain = CamBudget(golden_net(), 0.3, 0.1, target_layer="relu2")
    budget = CamBudget(golden_net(), 0.3, 0.1, target_layer="relu2", control=control)
    torch.manual_seed(0)
    got = budget(EXPECTED["x"])
    torch.manual_seed(0)
    assert torch.equal(got, control_map(plain(EXPECTED["x"]), control, 0.3, 0.1))
    assert (got == plain(EXPECTED["x"])).all() == (control == "none")
    assert budget(EXPECTED["x"][:0]).shape == (0, 1, 16, 16)


def test_unknown_control():
    with pytest.raises(ValueError, match="control must be one of none, permuted, random, inverted, uniform, got 'x'"):
        CamBudget(golden_net(), target_layer="relu2", control="x")

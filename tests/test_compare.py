"""Tests of part_fast.experiments.compare: differences and intervals by hand, how often an interval holds the truth."""

import math

import pytest
import torch

from part_fast.experiments.compare import difference, interval, mean_and_spread


def bools(*rows):
    return [torch.tensor([c == "1" for c in row]) for row in rows]


def test_mean_and_spread():
    assert mean_and_spread([1.0, 3.0]) == {"mean": 2.0, "spread": pytest.approx(math.sqrt(2))}
    assert mean_and_spread([0.5]) == {"mean": 0.5, "spread": 0.0}
    assert mean_and_spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "spread": 1.0}


def test_interval_by_hand():
    before, after = bools("1000", "0000"), bools("1110", "1000")
    # Per seed +2/4 and +1/4; the images' means 0.5, 0.5, 0.5, 0, whose deviation is 0.25.
    found = interval(before, after)
    assert found["mean"] == 0.375
    assert found["per_seed"] == [0.5, 0.25]
    error = math.sqrt(0.25**2 / 2 / 2 + 0.25**2 / 4)
    assert found["half_width"] == pytest.approx(12.7062 * error, rel=1e-5)  # t, one degree of freedom, 97.5 %
    assert found["half_width_all"] == found["half_width"]
    assert not found["significant"]
    # Bonferroni for five: t at 99.5 %.
    assert interval(before, after, 5)["half_width_all"] == pytest.approx(63.6567 * error, rel=1e-5)


def test_interval_of_no_difference_is_empty_and_not_significant():
    same = bools("1010", "1100")
    found = interval(same, same)
    assert (found["mean"], found["half_width"], found["significant"]) == (0, 0, False)


def test_interval_holds_the_truth_as_often_as_it_says():
    """400 studies of two equal methods: seeds differ, test images differ; zero is missed in about 5 % at most."""
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for _ in range(400):
        easy = torch.rand(1, 300, generator=generator)
        skill = 0.05 * torch.randn(2, 5, 1, generator=generator)
        hits = torch.rand(2, 5, 300, generator=generator) < (easy + skill)
        missed += interval(list(hits[0]), list(hits[1]))["significant"]
    # 20 expected if the interval were exact; 35 is more than three standard deviations above.
    assert missed <= 35


def test_interval_finds_a_clear_difference():
    generator = torch.Generator().manual_seed(1)
    before = [torch.rand(1000, generator=generator) < 0.5 for _ in range(5)]
    after = [torch.rand(1000, generator=generator) < 0.6 for _ in range(5)]
    found = interval(before, after)
    assert found["significant"]
    assert abs(found["mean"] - 0.1) < found["half_width"]


@pytest.mark.parametrize(("before", "after"), [(("10",), ("11",)), (("10", "01"), ("11",))])
def test_interval_needs_seeds(before, after):
    with pytest.raises(ValueError, match="as many seeds each, at least 2"):
        interval(bools(*before), bools(*after))


def test_difference_of_accuracies_is_paired_and_judged():
    before = [torch.tensor([True, False] * 50) for _ in range(3)]
    same = difference(before, before)
    assert (same["mean"], same["spread"], same["standard_error"], same["significant"]) == (0.0, 0.0, 0.0, False)

    better = []
    for seed, right in enumerate(before):
        after = right.clone()
        after[1 : 41 + 2 * seed : 2] = True  # 20, 21, 22 of 100 images more
        better.append(after)
    clear = difference(before, better)
    assert clear["mean"] == pytest.approx(0.21)
    assert clear["spread"] == pytest.approx(0.01)
    changes = torch.stack(better).double().mean(0) - torch.stack(before).double().mean(0)
    assert clear["standard_error"] == pytest.approx(float(changes.std()) / math.sqrt(100))
    assert clear["significant"]

    one_image = [right.clone() for right in before]
    for right in one_image:
        right[1] = True
    assert difference(before, one_image)["spread"] == 0
    assert not difference(before, one_image)["significant"]  # one test image more is chance
    assert not difference(before[:1], better[:1])["significant"]  # one seed has no spread

"""Tests of part_fast.experiments.compare: differences and intervals by hand, how often an interval holds the truth."""

import math

import pytest
import torch

from part_fast.experiments.compare import SeedVariance, difference, interval, mean_and_spread, seed_variance


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


def test_variance_of_seeds_by_hand():
    """Every arm with every seed: what row and column means leave."""
    y = torch.rand(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rest = y - y.mean(0) - y.mean(1, keepdim=True) + y.mean()
    accuracies = {(f"arm {arm}", seed): float(y[arm, seed]) for arm in range(4) for seed in range(5)}
    found = seed_variance(accuracies)
    assert found == SeedVariance(pytest.approx(float(rest.square().sum()) / 12), 12)
    # A seed that is better for all arms, and an arm that is better with all seeds, change nothing.
    moved = {(arm, seed): value + seed + 3 * (arm == "arm 2") for (arm, seed), value in accuracies.items()}
    assert seed_variance(moved) == SeedVariance(pytest.approx(found.variance), 12)
    # Nor does an arm with one seed, or a seed with one arm, which say nothing of the variance.
    alone = seed_variance({**accuracies, ("one seed", 3): 7.0, ("arm 1", 8): -4.0})
    assert alone == SeedVariance(pytest.approx(found.variance), 12)


def test_variance_of_seeds_without_degrees_of_freedom():
    found = seed_variance({("AT", 0): 0.5, ("PART", 0): 0.6, ("AT", 1): 0.7})
    assert found.degrees == 0
    assert math.isnan(found.variance)


def test_the_pooled_interval_of_two_arms_is_that_of_their_differences():
    generator = torch.Generator().manual_seed(3)
    before, after = ([torch.rand(40, generator=generator) < 0.5 for _ in range(4)] for _ in range(2))
    arms = {"AT": before, "PART": after}
    runs = {(arm, seed): float(hit.double().mean()) for arm, of in arms.items() for seed, hit in enumerate(of)}
    alone, pooled = interval(before, after, 3), interval(before, after, 3, seed_variance(runs))
    assert {**pooled, "per_seed": None} == pytest.approx({**alone, "per_seed": None})


def test_the_pooled_interval_of_one_seed_by_hand():
    found = interval(bools("1000"), bools("1110"), 1, SeedVariance(0.01, 2))
    # The images' changes are 0, 1, 1, 0, whose deviation is 1 / sqrt(3).
    error = math.sqrt(2 * 0.01 + 1 / 3 / 4)
    assert found["mean"] == 0.5
    assert found["half_width"] == pytest.approx(4.30265 * error, rel=1e-5)  # t, two degrees of freedom, 97.5 %
    with pytest.raises(ValueError, match="as many seeds each, at least 1, got 0 and 0"):
        interval([], [], 1, SeedVariance(0.01, 2))


def test_the_pooled_interval_holds_the_truth_as_often_as_it_says():
    """200 studies of six equal arms, two with five seeds, four with one: zero is missed in about 5 % at most."""
    generator = torch.Generator().manual_seed(4)
    runs = [(arm, seed) for arm in range(6) for seed in range(5 if arm < 2 else 1)]
    missed = 0
    for _ in range(200):
        easy, of_seed = torch.rand(300, generator=generator), 0.05 * torch.randn(5, generator=generator)
        skill = {run: of_seed[run[1]] + 0.05 * torch.randn((), generator=generator) for run in runs}
        hits = {run: torch.rand(300, generator=generator) < easy + skill[run] for run in runs}
        pooled = seed_variance({(str(arm), seed): float(hit.double().mean()) for (arm, seed), hit in hits.items()})
        missed += interval([hits[0, 0]], [hits[5, 0]], 1, pooled)["significant"]
    # 10 expected if the interval were exact; 20 is more than three standard deviations above.
    assert missed <= 20


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

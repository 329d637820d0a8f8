"""Paired statistics against scipy, against simulated data with known effects, and against R's numbers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from moa.studies.statistics import clustered_error, estimate, holm, sign_flip
from moa.studies.study import Claim
from moa.studies.verdicts import judge

SEEDS, TASKS, ITEMS = 5, 4, 50


def answers(random, effect=0.0, seed_spread=0.1, item_spread=0.3, methods=2):
    """Right and wrong (methods, tasks, seeds, items) of methods that differ by ``effect`` on the logit scale.

    Items differ in difficulty, methods in which items they find hard, and seeds in how well they went.
    """
    difficulty = random.normal(0.5, 1.0, (TASKS, 1, ITEMS))
    found = []
    for method in range(methods):
        taste = random.normal(0, item_spread, (TASKS, 1, ITEMS))
        luck = random.normal(0, seed_spread, (1, SEEDS, 1)) + random.normal(0, seed_spread, (TASKS, SEEDS, 1))
        chance = 1 / (1 + np.exp(-(difficulty + taste + luck + effect * method)))
        found.append(random.random((TASKS, SEEDS, ITEMS)) < chance)
    return np.array(found, dtype=float)


def true_difference(effect, draws=400_000):
    """What a method with ``effect`` gains on average, by brute force over new items, seeds and tastes."""
    random = np.random.default_rng(99)
    common = random.normal(0.5, 1.0, draws)
    spread = np.sqrt(0.3**2 + 2 * 0.1**2)
    plain, better = (1 / (1 + np.exp(-(common + random.normal(0, spread, draws) + e))) for e in (0.0, effect))
    return float((better - plain).mean())


def test_one_item_is_the_t_test_over_seeds():
    values = np.random.default_rng(0).normal(0.4, 1, (7, 1))
    theirs = stats.ttest_1samp(values[:, 0], 0)
    ours = estimate([values])
    assert ours.p == pytest.approx(theirs.pvalue)
    assert ours.mean == pytest.approx(values.mean())
    assert ours.interval[0] == pytest.approx(theirs.confidence_interval().low, rel=0.2)


def test_one_seed_is_the_t_test_over_items():
    values = np.random.default_rng(1).normal(0.1, 1, (1, 200))
    theirs = stats.ttest_1samp(values[0], 0)
    ours = estimate([values])
    assert ours.p == pytest.approx(theirs.pvalue)
    low, high = theirs.confidence_interval()
    assert ours.interval == pytest.approx((low, high), abs=0.1 * (high - low))


def test_the_error_is_the_spread_of_the_estimate_over_new_seeds_and_items():
    random = np.random.default_rng(2)
    means, errors = [], []
    for _ in range(400):
        ours, theirs = answers(random, seed_spread=0.2, item_spread=0.8)
        means.append((ours - theirs).mean())
        errors.append(clustered_error(list(ours - theirs))[0])
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.12)


@pytest.mark.parametrize(("effect", "spread"), [(0.0, 0.05), (0.0, 0.3), (0.4, 0.1)])
def test_intervals_cover_the_true_difference(effect, spread):
    random = np.random.default_rng(3)
    truth = true_difference(effect) if effect else 0.0
    covered = 0
    for _ in range(200):
        plain, better = answers(random, effect, seed_spread=spread)
        low, high = estimate(list(better - plain), draws=400).interval
        covered += low <= truth <= high
    assert 0.92 <= covered / 200 <= 0.998


def test_equal_methods_get_no_verdict():
    """Holm: at most one claim in twenty, each about three rivals at two budgets, says anything but "not shown"."""
    random = np.random.default_rng(4)
    said = 0
    for _ in range(40):
        scores = {}
        for budget in (1, 2):
            found = answers(random, methods=4)
            scores |= {(name, budget): tasks(one) for name, one in zip("abcd", found, strict=True)}
        said += judge(Claim("a", ["b", "c", "d"]), "accuracy", [1, 2], scores)["outcome"] != "open"
    assert said <= 6  # 40 * 0.05, and three standard deviations of a count


def tasks(values):
    return {f"task{place}": task for place, task in enumerate(values)}


def test_a_real_difference_is_found_in_either_direction():
    plain, better = answers(np.random.default_rng(5), effect=1.0)
    scores = {("plain", 1): tasks(plain), ("better", 1): tasks(better)}
    holds = judge(Claim("better", ["plain"]), "accuracy", [1], scores)
    fails = judge(Claim("plain", ["better"]), "accuracy", [1], scores)
    assert (holds["outcome"], fails["outcome"]) == ("holds", "fails")
    assert holds["verdict"].startswith("Yes.")
    assert fails["verdict"].startswith("No.")
    (entry,) = holds["comparisons"]
    assert entry["difference"] == pytest.approx(100 * (better - plain).mean())
    assert entry["difference"] == pytest.approx(-fails["comparisons"][0]["difference"])


def test_less_loss_is_better():
    random = np.random.default_rng(6)
    high = {"task": random.normal(2.0, 0.1, (4, 30))}
    low = {"task": high["task"] - 0.5 + random.normal(0, 0.02, (4, 30))}
    judged = judge(Claim("low", ["high"]), "answer_loss", [1], {("low", 1): low, ("high", 1): high})
    assert judged["outcome"] == "holds"
    assert judged["comparisons"][0]["difference"] == pytest.approx(0.5, abs=0.02)
    assert judged["unit"] == "nats"


def test_runs_without_a_score_leave_their_seed_out():
    random = np.random.default_rng(7)
    ours, theirs = random.normal(2.0, 0.1, (2, 4, 30))
    ours[1] = np.nan
    scores = {("a", 1): {"task": ours}, ("b", 1): {"task": theirs}}
    (entry,) = judge(Claim("a", ["b"]), "answer_loss", [1], scores)["comparisons"]
    assert entry["seeds"] == 3
    kept = [0, 2, 3]
    assert entry["difference"] == pytest.approx((theirs[kept] - ours[kept]).mean())
    scores = {("a", 1): {"task": np.full((2, 3), np.nan)}, ("b", 1): {"task": theirs[:2, :3]}}
    assert judge(Claim("a", ["b"]), "answer_loss", [1], scores)["outcome"] == "open"


def test_a_missing_method_leaves_the_claim_unfinished():
    one = {"task": np.random.default_rng(8).normal(0, 1, (3, 10))}
    judged = judge(Claim("a", ["b", "c"]), "accuracy", [1], {("a", 1): one, ("b", 1): {"task": one["task"] + 1e-3}})
    assert judged["outcome"] in ("unfinished", "fails")
    assert judged["missing"] == [{"budget": 1, "rival": "c"}]


def test_holm_is_what_r_says():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_sign_flip_is_the_count_over_all_signs():
    values = np.array([0.5, 1.25, -0.25, 2.0, 0.75])
    flipped = [abs(np.mean(np.array(signs) * values)) for signs in product((1, -1), repeat=5)]
    assert sign_flip(values) == pytest.approx(np.mean(np.array(flipped) >= abs(values.mean()) - 1e-12))
    assert sign_flip(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2 / 32)


def test_nothing_varies_and_nothing_is_there():
    same = estimate([np.zeros((3, 4))])
    assert (same.mean, same.interval, same.p) == (0.0, (0.0, 0.0), 1.0)
    assert estimate([np.ones((1, 1))]).p == 1.0  # a single value tells nothing
    assert estimate([np.ones((1, 1)), np.full((1, 1), 0.5)]).p == 1.0  # nor do single values of different tasks
    for bad in ([], [np.zeros((0, 3))], [np.zeros((2, 3)), np.zeros((3, 3))], [np.array([[np.nan]])]):
        with pytest.raises(ValueError, match=r"nothing to compare|numbers of seeds|finite"):
            estimate(bad)


def test_the_same_data_give_the_same_interval():
    values = [np.random.default_rng(9).normal(0, 1, (4, 20))]
    assert estimate(values) == estimate(values)

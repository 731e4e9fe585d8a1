"""bench/study.py: its intervals."""
import numpy as np
import pytest
import study


def test_the_difference_is_paired_and_its_interval_is_over_seeds_and_problems():
    rng = np.random.default_rng(1)
    hard, seed = rng.random(400), rng.normal(size=(6, 1)) / 5  # what both methods share
    theirs = (hard + seed + rng.normal(size=(6, 400)) / 20 > 0.5).astype(float)
    ours = (hard + seed + 0.1 + rng.normal(size=(6, 400)) / 20 > 0.5).astype(float)
    (mean, low, high), error = study.difference(ours, theirs)
    assert mean == pytest.approx((ours - theirs).mean()) and 0 < low < mean < high < 0.2
    assert error == pytest.approx((high - low) / 3.92, rel=0.1)
    of_seeds = np.array([[0.0], [1.0]] * 3).repeat(400, 1)  # all the variance is between seeds
    assert study.difference(of_seeds, 0 * of_seeds)[1] == pytest.approx(0.5 / 6**0.5, rel=0.05)

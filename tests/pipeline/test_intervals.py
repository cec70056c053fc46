"""Bootstrap intervals: known spread, missing values, pairs, seeds."""

from __future__ import annotations

import numpy as np

from pipeline.metrics.intervals import bootstrap_means, intervals


def test_the_interval_of_a_share_is_the_textbooks() -> None:
    hits = (np.arange(500) < 200).astype(float)
    low, high = intervals({"hit": hits})["hit"] or (0, 0)
    spread = 1.96 * np.sqrt(0.4 * 0.6 / 500)
    assert abs(low - (0.4 - spread)) < 0.01 and abs(high - (0.4 + spread)) < 0.01


def test_missing_values_are_left_out_and_absent_columns_have_none() -> None:
    column = np.full(50, np.nan)
    found = intervals({"some": np.where(np.arange(50) < 5, 2.0, np.nan), "none": column})
    assert found == {"some": [2.0, 2.0], "none": None}
    assert intervals({}) == {}


def test_columns_share_their_draws() -> None:
    first = np.random.default_rng(0).random(100)
    means = bootstrap_means(np.stack([first, first + 1, np.ones(100)], axis=1))
    np.testing.assert_allclose(means[:, 1] - means[:, 0], means[:, 2])


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).random((30, 1))
    assert np.array_equal(bootstrap_means(values, seed=3), bootstrap_means(values, seed=3))
    assert not np.array_equal(bootstrap_means(values, seed=3), bootstrap_means(values, seed=4))

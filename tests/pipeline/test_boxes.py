"""Binarisation, largest component and box, against SciPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from pipeline.metrics.boxes import binarize, binarize_quantile, component_box, largest_component, mask_box, scale_box

BINARY = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@settings(max_examples=200, deadline=None)
@given(BINARY)
def test_largest_component_is_scipys(binary: np.ndarray) -> None:
    labels, count = ndimage.label(binary)  # numbered in raster order
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    expected = labels == 1 + sizes.argmax() if count else np.zeros_like(binary)
    np.testing.assert_array_equal(largest_component(binary), expected)
    box = component_box(binary)
    if not count:
        assert box is None
        return
    assert box is not None
    rows, columns = ndimage.find_objects(expected.astype(int))[0]
    assert box == (columns.start, rows.start, columns.stop, rows.stop)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1 / 3, 0.5, 0.7, 1.0])
def test_a_constant_mask_has_no_box(value: float) -> None:
    mask = np.full((224, 224), value, dtype=np.float32)
    assert not binarize(mask).any()
    assert mask_box(mask) is None


@settings(max_examples=100, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_the_stored_mask_gives_the_same_box_as_its_values(mask: np.ndarray) -> None:
    assert mask_box(mask) == mask_box(mask.astype(np.float64) / 255)


@settings(max_examples=50, deadline=None)
@given(BINARY, st.integers(2, 4))
def test_stretching_by_nearest_stretches_the_box(binary: np.ndarray, times: int) -> None:
    stretched = binary.repeat(times, axis=0).repeat(times, axis=1)
    box, larger = component_box(binary), component_box(stretched)
    assert larger == (None if box is None else tuple(times * edge for edge in box))


def test_ties_go_to_the_first_in_raster_order() -> None:
    binary = np.zeros((6, 6), dtype=bool)
    binary[0, 4:] = True  # higher, though further right
    binary[2:4, 0] = True
    assert component_box(binary) == (4, 0, 6, 1)


def test_diagonal_neighbours_are_apart() -> None:
    assert largest_component(np.eye(3, dtype=bool)).sum() == 1


def test_published_boxes_lose_their_last_row_and_column() -> None:
    mask = np.zeros((8, 8), dtype=np.float32)
    mask[2:5, 3:7] = 1
    assert mask_box(mask) == (3, 2, 7, 5)
    assert mask_box(mask, compat="published") == (3, 2, 6, 4)
    assert mask_box(np.zeros((8, 8), dtype=np.float32), compat="published") == (0, 0, 0, 0)


def test_the_quantile_rule_keeps_the_mean_as_share() -> None:
    mask = np.random.default_rng(0).random((40, 40)) ** 3
    assert abs(binarize_quantile(mask).mean() - mask.mean()) < 2 / mask.size


def test_scaling_to_the_input() -> None:
    assert scale_box((1, 2, 3, 4), (8, 16), 64) == (4, 16, 12, 32)

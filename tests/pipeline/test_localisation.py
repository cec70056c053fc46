"""IoU, soft F1 and mask statistics against counting pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.localisation import box_ious, clip_boxes, published_input_boxes, soft_f1
from pipeline.metrics.masks import entropy, mask_iou, spread, total_variation, upsample_nearest
from pipeline.metrics.saliency_metric import SaliencyMetric
from pipeline.metrics.tally import METRICS, Tally, Truth, maps_of

SIZE = 24
CORNERS = st.tuples(*[st.integers(-6, SIZE + 6)] * 4)
INSIDE = st.tuples(*[st.integers(0, SIZE)] * 4)


def painted(box: tuple[int, ...]) -> np.ndarray:
    x0, y0, x1, y1 = (max(edge, 0) for edge in box)
    image = np.zeros((SIZE, SIZE), dtype=bool)
    image[y0:y1, x0:x1] = True
    return image


@settings(max_examples=200, deadline=None)
@given(INSIDE, CORNERS)
def test_iou_counts_pixels(predicted: tuple[int, ...], true: tuple[int, ...]) -> None:
    first, second = painted(predicted), painted(true)
    expected = (first & second).sum() / max((first | second).sum(), 1) if second.any() else 0.0
    assert box_ious(predicted, np.array([true]), SIZE)[0] == pytest.approx(expected)


def test_no_box_hits_nothing() -> None:
    assert box_ious(None, np.array([[0, 0, 5, 5]]), SIZE).tolist() == [0.0]


def test_the_published_union_counts_what_the_crop_cut_away() -> None:
    true = np.array([[-24, 0, 24, 24]])
    assert box_ious((0, 0, 24, 24), true, SIZE)[0] == 1.0
    assert box_ious((0, 0, 24, 24), true, SIZE, compat="published")[0] == 0.5


@settings(max_examples=100, deadline=None)
@given(CORNERS, st.integers(0, 1000), st.sampled_from([4, 6, 24]))
def test_soft_f1_counts_pixels(true: tuple[int, ...], seed: int, cells: int) -> None:
    mask = np.random.default_rng(seed).random((cells, cells))
    inside = painted(true)
    full = upsample_nearest(mask, SIZE)
    precision = full[inside].sum() / (full.sum() + 1e-6)
    recall = full[inside].sum() / max(inside.sum(), 1)
    expected = 2 * precision * recall / (precision + recall + 1e-6)
    assert soft_f1(mask, np.array([true]), SIZE)[0] == pytest.approx(expected, abs=1e-9)


def test_clipping_leaves_an_outside_box_empty() -> None:
    assert clip_boxes(np.array([[-9, -9, -3, 30], [-2.5, 1, 3, 2]]), SIZE).tolist() == [[0, 0, 0, 24], [0, 1, 3, 2]]


def test_published_coordinates_are_truncated_toward_zero() -> None:
    # 448 x 224: 112 pixels are cut off on the left.
    assert published_input_boxes(np.array([[111, 10, 300.9, 20]]), 448, 224, 224).tolist() == [[-1, 10, 188, 20]]
    assert published_input_boxes(np.array([[111, 10, 301, 20]]), 448, 224, 224, squash=True).tolist() == [
        [55, 10, 150, 20]
    ]


def test_statistics_of_simple_masks() -> None:
    half = np.zeros((1, 4, 4))
    half[:, :, 2:] = 1
    grey = np.full((1, 4, 4), 0.5)
    assert entropy(np.concatenate([half, grey])).tolist() == [0.0, 1.0]
    assert entropy(grey, compat="published").tolist() == [0.5]
    assert total_variation(half, 8).tolist() == pytest.approx([1 / 7])  # one of seven neighbours across differs
    assert spread(np.array([0.2, 0.4]), batch_size=1) == pytest.approx(np.sqrt(0.02))
    assert np.isnan(spread(np.array([0.2]), batch_size=1))


def test_mask_iou_leaves_out_what_is_ignored() -> None:
    truth = np.zeros((4, 4), dtype=np.uint8)
    truth[:2] = 1
    truth[2] = 255
    binary = np.zeros((2, 2), dtype=bool)
    binary[:, 0] = True  # left half: 4 of 8 foreground, 2 ignored, 2 background pixels
    assert mask_iou(binary, truth) == pytest.approx(4 / 10)
    assert np.isnan(mask_iou(binary, np.zeros((4, 4), dtype=np.uint8)))


def saliency(count: int) -> SaliencyMetric:
    return SaliencyMetric(np.zeros(count), np.zeros(count), np.ones(count, dtype=bool))


def test_a_tally_by_hand() -> None:
    masks = np.zeros((4, 6, 6), dtype=np.float32)
    masks[0, :3, :3] = 1  # the true box
    masks[1, :3, :3] = 1  # the true box, but the class is wrong
    masks[3, :3, :3] = 1  # nothing is known of this image
    box = np.array([[0.0, 0.0, 12.0, 12.0]])
    truth = Truth(
        boxes=[box, box, box, None],
        masks=[None] * 4,
        top1=np.array([True, False, True, True]),
        top5=np.array([True, True, True, True]),
    )
    tally = Tally(size=SIZE)
    tally.add(maps_of(masks, SIZE), truth, saliency(4))
    summary = tally.summary(batch_size=4)
    assert tuple(summary) == METRICS
    assert summary["LE"] == pytest.approx(1 / 3)  # the empty mask has no box and misses
    assert summary["OM"] == pytest.approx(2 / 3)
    assert summary["F1"] == pytest.approx(2 / 3, abs=1e-5)
    assert summary["top1"] == 0.75 and summary["n_images"] == 4
    assert summary["PxAP"] is None and summary["mask_iou"] is None
    assert summary["MaxBoxAccV2"] == pytest.approx(2 / 3)


def test_a_box_that_the_crop_cut_away_is_not_asked_for() -> None:
    masks = np.zeros((1, 6, 6), dtype=np.float32)
    masks[0, :3, :3] = 1
    gone = np.array([[30.0, 0.0, 40.0, 12.0]])
    truth = Truth(boxes=[gone], masks=[None], top1=np.array([True]), top5=np.array([True]))
    right, published = Tally(size=SIZE), Tally(size=SIZE, compat="published")
    right.add(maps_of(masks, SIZE), truth, saliency(1))
    published.add(maps_of(masks, SIZE, compat="published"), truth, saliency(1))
    assert right.summary(batch_size=1)["LE"] is None
    assert published.summary(batch_size=1)["LE"] == 1.0

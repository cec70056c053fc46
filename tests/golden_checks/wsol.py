"""Section 7: PxAP and MaxBoxAcc of the WSOL benchmark."""

from __future__ import annotations

import numpy as np

from pipeline.metrics.localisation import published_input_boxes
from pipeline.metrics.masks import IGNORE
from pipeline.metrics.wsol import V1_IOUS, V2_IOUS, MaxBoxAcc, PixelPrecision, estimate_boxes
from tests.golden_checks._golden import GoldenFile, assert_close
from tests.golden_checks._inputs import blocks

SIZE = 224


def check(golden: GoldenFile) -> None:
    scores = blocks(golden["scoremap_lr"].astype(np.float64) / 255)  # (10, 224, 224)
    check_pixels(golden, scores)
    check_boxes(golden, scores)
    check_estimates(golden, scores)


def check_pixels(golden: GoldenFile, scores: np.ndarray) -> None:
    foreground = unpack(golden["gt_mask"]).any(axis=1)
    truth = np.where(foreground, 1, np.where(unpack(golden["ignore_mask"]), IGNORE, 0)).astype(np.uint8)
    for step in ("0.01", "0.001"):
        pixels = PixelPrecision(step=float(step))
        for score, mask in zip(scores, truth, strict=True):
            pixels.add(score, mask)
        assert_close(100 * pixels.value(), golden[f"pxap_{step}"], 1e-9, f"pxap_{step}")
        if step == "0.01":
            np.testing.assert_array_equal(pixels.foreground, golden["hist_true_0.01"])
            np.testing.assert_array_equal(pixels.background, golden["hist_false_0.01"])


def check_boxes(golden: GoldenFile, scores: np.ndarray) -> None:
    owners = golden["gt_box_image"]
    resized = np.stack(
        [
            published_input_boxes(box[None], *golden["image_size_wh"][owner], SIZE, squash=True)[0]
            for box, owner in zip(golden["gt_boxes_original"], owners, strict=True)
        ]
    )
    np.testing.assert_array_equal(resized, golden["gt_boxes_resized"])
    for version, ious in (("v1", V1_IOUS), ("v2", V2_IOUS)):
        accuracy = MaxBoxAcc(size=SIZE, ious=ious, multiple=version == "v2", compat="published")
        for image, score in enumerate(scores):
            accuracy.add(score, resized[owners == image])
        np.testing.assert_array_equal(accuracy.right, golden[f"curve_{version}"])
        assert_close(100 * accuracy.values(), golden[f"maxboxacc_{version}"], 1e-9, f"maxboxacc_{version}")
        assert_close(100 * accuracy.values().mean(), golden[f"performance_{version}"], 1e-9, f"performance_{version}")


def check_estimates(golden: GoldenFile, scores: np.ndarray) -> None:
    counts = golden["est_boxes_multi_count"]
    recorded = iter(np.split(golden["est_boxes_multi"], np.cumsum(counts.ravel())[:-1]))
    for image, score in enumerate(scores):
        for column, threshold in enumerate(golden["est_thresholds"]):
            where = f"image {image}, threshold {threshold}"
            single = estimate_boxes(score, threshold, size=SIZE, multiple=False, compat="published")
            np.testing.assert_array_equal(single, golden["est_boxes_single"][image, column][None], err_msg=where)
            several = estimate_boxes(score, threshold, size=SIZE, multiple=True, compat="published")
            assert len(several) == counts[image, column], where
            assert sorted(several.tolist()) == sorted(next(recorded).tolist()), where


def unpack(bits: np.ndarray) -> np.ndarray:
    return np.unpackbits(bits, axis=-1).reshape(*bits.shape[:-1], SIZE, SIZE).astype(bool)

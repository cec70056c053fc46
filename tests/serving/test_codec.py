"""Stored masks: what goes in comes out, and the queries agree with the up-sampled mask."""

from __future__ import annotations

import numpy as np
import pytest

from serving import codec


def row_of(mask: np.ndarray, *, width: int = 80, height: int = 40, view: tuple[float, ...] | None = None) -> dict:
    view = view or (0.0, 0.0, float(width), float(height))
    png = codec.encode_mask(mask)
    row = {
        "uri": "a.jpg",
        "error": None,
        "mask": png,
        "view": list(view),
        "width": width,
        "height": height,
        "box": None,
    }
    return row | {"box": codec.box(row)}


def test_round_trip_is_rounding_to_255_levels() -> None:
    mask = np.random.default_rng(0).random((7, 9), dtype=np.float32)
    png = codec.encode_mask(mask)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert np.array_equal(codec.decode_mask(png), np.rint(mask * 255).astype(np.uint8))
    assert np.abs(codec.load(row_of(mask)) - mask).max() <= 0.5 / 255 + 1e-6


def test_what_is_no_number_and_no_share_is_kept_in_range() -> None:
    mask = np.array([[np.nan, -3.0], [1.5, 0.5]], dtype=np.float32)
    assert codec.quantize(mask).tolist() == [[0, 0], [255, 128]]


def test_a_png_that_is_no_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="no 8-bit grey PNG"):
        codec.decode_mask(codec.encode_png(np.zeros((2, 2, 3), dtype=np.uint8)))
    with pytest.raises(ValueError, match="could not be scored"):
        codec.load({"uri": "a.jpg", "mask": None, "error": "undecodable: empty"})


def test_box_area_and_iou_without_up_sampling() -> None:
    mask = np.zeros((4, 8), dtype=np.float32)
    mask[1:3, 2:6] = 1.0
    row = row_of(mask)
    assert codec.box(row) == (20.0, 10.0, 60.0, 30.0)
    assert codec.area(row) == pytest.approx(0.25)
    assert codec.area(row, threshold=0.5) == 0.25
    assert codec.box_iou(row, (20, 10, 60, 30)) == 1.0
    assert codec.box_iou(row, (40, 10, 80, 30)) == pytest.approx(1 / 3)
    assert codec.box_iou(row, (70, 35, 80, 40)) == 0.0
    assert codec.mask_iou(row, row) == 1.0
    full = codec.load(row, original=True)
    assert full.shape == (40, 80)
    rows, columns = np.nonzero(full)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == codec.box(row)


def test_a_constant_mask_has_no_box_but_one_at_a_threshold() -> None:
    row = row_of(np.full((4, 4), 0.7, dtype=np.float32))
    assert codec.box(row) is None
    assert codec.box_iou(row, (0, 0, 1, 1)) == 0.0
    assert codec.box(row, threshold=0.5) == (0.0, 0.0, 80.0, 40.0)
    assert codec.box(row, threshold=0.9) is None


def test_a_cropped_view_leaves_the_rest_without_evidence() -> None:
    row = row_of(np.ones((4, 4), dtype=np.float32), view=(20.0, 0.0, 60.0, 40.0))
    for smooth in (False, True):
        full = codec.load(row, original=True, smooth=smooth)
        assert full[:, 20:60].min() == 1.0
        assert full[:, :20].max() == full[:, 60:].max() == 0.0


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (40, 4000)])
def test_overlay_of_any_shape(size: tuple[int, int]) -> None:
    height, width = size
    mask = np.random.default_rng(1).random((16, 16), dtype=np.float32)
    image = np.full((height, width, 3), 200, dtype=np.uint8)
    drawn = codec.overlay(image, row_of(mask, width=width, height=height))
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8


def test_no_evidence_leaves_the_picture_as_it_is() -> None:
    image = np.random.default_rng(2).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    assert np.array_equal(codec.overlay(image, row_of(np.zeros((4, 4), dtype=np.float32))), image)


def test_up_sampling_repeats_cells() -> None:
    mask = np.random.default_rng(3).random((4, 4), dtype=np.float32)
    row = row_of(mask)
    assert np.array_equal(codec.load(row, size=(16, 16)), codec.load(row).repeat(4, 0).repeat(4, 1))
    assert codec.stack([row["mask"], row["mask"]]).shape == (2, 4, 4)

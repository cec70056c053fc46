"""Fitting pictures to a network's input: Pillow and torchvision as references, odd shapes, boxes there and back."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional

from pipeline.data.decode import read_image
from pipeline.data.geometry import View, box_to_input, box_to_original, fit, view_of

SHAPES = [(1, 1), (40, 4000), (900, 3), (1, 500), (7, 2), (223, 224), (375, 500), (500, 333), (64, 64), (1000, 1200)]


def reference(image: np.ndarray, size: int, geometry: str) -> np.ndarray:
    picture = Image.fromarray(image)
    if geometry == "squash":
        return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
    return np.asarray(functional.center_crop(functional.resize(picture, [size]), [size, size]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("geometry", ["squash", "crop"])
@pytest.mark.parametrize("size", [56, 224])
def test_any_shape_equals_the_reference_but_for_rounding(shape, geometry, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    fitted, view = fit(image, size, geometry)
    assert fitted.shape == (size, size, 3) and fitted.dtype == np.uint8 and fitted.flags.c_contiguous
    assert view == view_of(shape[1], shape[0], size, geometry)
    assert 0 <= view.x0 < view.x1 <= shape[1] and 0 <= view.y0 < view.y1 <= shape[0]
    difference = np.abs(fitted.astype(int) - reference(image, size, geometry))
    assert difference.max() <= 2 and difference.mean() < 0.25


TALL = [(530, 220), (300, 230), (500, 100), (2000, 1500), (1378, 801), (1379, 801)]


@pytest.mark.parametrize("shape", [*SHAPES, *TALL])
def test_a_squashed_picture_is_pillow_s(shape):
    """Each of the two steps has one pass only, so no release of Pillow can choose another order."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    columns_first = shape[0] - 224 > max(0, 2 * (shape[1] - 224))
    once = Image.fromarray(image).resize(
        (shape[1], 224) if columns_first else (224, shape[0]), Image.Resampling.BILINEAR
    )
    wanted = np.asarray(once.resize((224, 224), Image.Resampling.BILINEAR))
    if int(PIL.__version__.partition(".")[0]) >= 13:
        np.testing.assert_array_equal(wanted, reference(image, 224, "squash"), err_msg="Pillow has another rule now")
    difference = np.abs(fit(image, 224, "squash")[0].astype(int) - wanted)
    enlarged = min(shape) < 224
    assert difference.max() <= (2 if enlarged else 1) and difference.mean() < (0.1 if enlarged else 0.01)


def test_photographs_are_as_near_to_the_exact_sums_as_pillow_s(shared_dir):
    ours, pillows, apart, levels = [], [], [], []
    for path in sorted((shared_dir / "data" / "sample_images").glob("*.JPEG")):
        image = read_image(path)
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        exact = torch.nn.functional.interpolate(planes, (224, 224), mode="bilinear", antialias=True)[0]
        exact = exact.permute(1, 2, 0).numpy()
        fitted, pillow = fit(image, 224, "squash")[0], reference(image, 224, "squash")
        ours.append(np.abs(fitted - exact).mean())
        pillows.append(np.abs(pillow - exact).mean())
        apart.append((fitted - pillow.astype(float)).mean())
        levels.append(np.abs(fitted - pillow.astype(float)).mean())
    assert len(ours) == 24 and np.mean(ours) < 1.01 * np.mean(pillows)
    assert np.abs(apart).max() < 0.01
    if int(PIL.__version__.partition(".")[0]) >= 13:
        assert np.mean(levels) < 0.01 and max(levels) < 0.03


@pytest.mark.parametrize("geometry", ["squash", "crop"])
def test_no_resampling_at_the_target_size(geometry):
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    fitted, view = fit(image, 96, geometry)
    np.testing.assert_array_equal(fitted, image)
    assert view == (0, 0, 96, 96)


def test_arrays_that_are_read_only_or_not_contiguous():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image.flags.writeable = False
    for geometry in ("squash", "crop"):
        flipped = fit(image[:, ::-1], 32, geometry)[0]
        np.testing.assert_array_equal(flipped, fit(np.ascontiguousarray(image[:, ::-1]), 32, geometry)[0])


def test_a_crop_shows_its_view():
    """A picture that names its own pixels: what the input shows is where the view says it comes from."""
    x, y = np.meshgrid(np.arange(200), np.arange(120))
    image = np.stack([x, y, x + y], 2).astype(np.uint8) // 2
    for picture in (image, image.transpose(1, 0, 2)):
        fitted, view = fit(picture, 40, "crop")
        for row, column in ((5, 7), (20, 20), (33, 3)):
            x0, y0, x1, y1 = box_to_original((column, row, column + 1, row + 1), view, 40)
            centre = picture[int((y0 + y1) / 2), int((x0 + x1) / 2)]
            assert np.abs(fitted[row, column].astype(int) - centre).max() <= 2


def test_crop_of_a_large_picture_is_the_paper_s():
    assert view_of(500, 375, 224, "crop") == pytest.approx((37 * 500 / 298, 0, 261 * 500 / 298, 375))
    assert view_of(400, 800, 224, "crop") == (0, 200, 400, 600)
    assert view_of(500, 375, 224, "squash") == View(0, 0, 500, 375)


def test_unknown_geometry():
    with pytest.raises(ValueError, match=r"'stretch'.*squash, crop"):
        fit(np.zeros((4, 4, 3), np.uint8), 2, "stretch")  # type: ignore[arg-type]


sides = st.integers(1, 5000)


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.integers(1, 512), st.sampled_from(["squash", "crop"]), st.tuples(*[st.floats(-1e3, 1e4)] * 4))
def test_boxes_there_and_back(width, height, size, geometry, box):
    view = view_of(width, height, size, geometry)
    assert 0 <= view.x0 < view.x1 <= width and 0 <= view.y0 < view.y1 <= height
    assert box_to_input(view, view, size) == pytest.approx((0, 0, size, size))
    assert box_to_original((0, 0, size, size), view, size) == pytest.approx(view)
    assert box_to_original(box_to_input(box, view, size), view, size) == pytest.approx(box, abs=1e-6)


def test_mask_cells_map_like_input_pixels():
    view = view_of(640, 480, 224, "crop")
    assert box_to_original((14, 0, 28, 56), view, 56) == pytest.approx(box_to_original((56, 0, 112, 224), view, 224))


def test_boxes_alone_do_not_import_torch():
    code = "import sys; from pipeline.data.geometry import box_to_original; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

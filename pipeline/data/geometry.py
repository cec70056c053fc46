"""From pictures of any size to the square input of a network, and boxes back again.

``squash`` shows the network the whole picture, stretched to the input size.  ``crop`` is the paper's evaluation
protocol (section 4): short side to the input size, centre crop; what lies outside is never seen.

Pixel frames: pixel (i, j) covers the square [j, j+1) x [i, i+1), so that the whole picture is (0, 0, W, H).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

Geometry = Literal["squash", "crop"]
Box = tuple[float, float, float, float]


class View(NamedTuple):
    """The region of the upright original that the network saw, in pixels of that original (x1, y1 exclusive)."""

    x0: float
    y0: float
    x1: float
    y1: float


def view_of(width: int, height: int, size: int, geometry: Geometry) -> View:
    """The region of a ``width`` x ``height`` picture that an input of ``size`` x ``size`` pixels covers.

    For ``crop`` this is what resizing the short side to ``size`` (the long one rounded down to whole pixels) and
    cutting out the central ``size`` x ``size`` pixels leaves: up to some tenths of a pixel away from a centred square.
    """
    if geometry == "squash":
        return View(0.0, 0.0, float(width), float(height))
    if geometry != "crop":
        raise ValueError(f"geometry is {geometry!r}; it must be one of {', '.join(get_args(Geometry))}")
    short = min(width, height)

    def seen(length: int) -> tuple[float, float]:
        resized = int(size * length / short)
        start = round((resized - size) / 2)
        return start * length / resized, (start + size) * length / resized

    (x0, x1), (y0, y1) = seen(width), seen(height)
    return View(x0, y0, x1, y1)


def fit(image: np.ndarray, size: int, geometry: Geometry) -> tuple[np.ndarray, View]:
    """Resize a picture, antialiased and bilinear, to the input of a network.

    image: (H, W, 3) uint8 of any size from 1x1.  Returns (size, size, 3) uint8 and the region that it shows.
    The pixels are those of Pillow 13 (``Resampling.BILINEAR``): less than 0.01 grey levels apart on average (0.1 where a
    picture is enlarged).  Earlier releases take the rows first of tall pictures too, whose rounding differs by 0.2.
    A picture of ``size`` x ``size`` is handed on as it is, not copied.
    """
    height, width = image.shape[:2]
    view = view_of(width, height, size, geometry)
    if (width, height) == (size, size):
        return image, view
    if view == (0, 0, width, height):
        return _resize_whole(image, size), view
    cut = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=view)
    return np.array(cut), view


def _resize_whole(image: np.ndarray, size: int) -> np.ndarray:
    # torch's uint8 kernel computes the same sums as Pillow, up to ten times faster: decoding and fitting together then
    # take half the time.  It is imported late because boxes alone need none of it.
    import torch

    def resized_to(planes: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)

    height, width = image.shape[:2]
    resized = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]  # (1, 3, H, W)
    if height - size > max(0, 2 * (width - size)):  # Pillow's rule of which pass comes first; each one rounds
        resized = resized_to(resized, size, width)
    resized = resized_to(resized, size, size)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())  # (size, size, 3)


def box_to_input(box: Sequence[float], view: View, size: int) -> Box:
    """Pixels of the upright original to pixels of the input.  Not clipped: a box may reach beyond the view."""
    across, down = size / (view.x1 - view.x0), size / (view.y1 - view.y0)
    x0, y0, x1, y1 = (float(edge) for edge in box)
    return (x0 - view.x0) * across, (y0 - view.y0) * down, (x1 - view.x0) * across, (y1 - view.y0) * down


def box_to_original(box: Sequence[float], view: View, size: int) -> Box:
    """Pixels of the input to pixels of the upright original; the inverse of `box_to_input`.

    For a box in cells of a mask, pass the mask's side as ``size``: a mask covers exactly the view.
    """
    across, down = (view.x1 - view.x0) / size, (view.y1 - view.y0) / size
    x0, y0, x1, y1 = (float(edge) for edge in box)
    return x0 * across + view.x0, y0 * down + view.y0, x1 * across + view.x0, y1 * down + view.y0

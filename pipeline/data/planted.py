"""The embedded data set: pictures whose evidence is known because it was planted.

Each picture holds one object of its class on a textured background among distractors.  A class is a shape filled with a
texture of its own; colours, places, sizes, tilts and the light vary alike in all classes, and so do backgrounds and
distractors, so that the object's interior is the only evidence.  Its mask is therefore the true saliency map.

`write_planted` leaves an ordinary data folder: ``train/``, ``val/``, ``boxes.csv``, ``images.csv`` and ``masks/``.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

MASK_VALUE = 1
"""Foreground in the mask files; palette entry 1 is white, so that a viewer shows black and white."""

_SPLITS = ("train", "val")
_OVERSAMPLING = 4
_MIN_AREA, _MAX_AREA = 0.085, 0.24
"""Of an object, as shares of the picture."""
_MAX_BOX_SIDE = 0.66
"""Longest side of an object's box, as a share of the picture's."""

Coordinates = tuple[np.ndarray, np.ndarray]
"""x and y of each pixel in the frame of an object: centred on it, turned with it, its radius 1; each (H, W)."""


# --- Shapes: closed outlines (n, 2) within the unit circle. ---


def _turn(outline: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return outline @ np.array([(cos, sin), (-sin, cos)])


def _ellipse(aspect: float = 1.0, start: float = 0.0, end: float = 360.0) -> np.ndarray:
    angle = np.radians(np.linspace(start, end, 60))
    return np.stack([np.cos(angle), aspect * np.sin(angle)], 1)


def _polygon(corners: int, turn: float = -90.0) -> np.ndarray:
    angle = np.radians(turn + 360 * np.arange(corners) / corners)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def _star(points: int, inner: float) -> np.ndarray:
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return _polygon(2 * points) * radius[:, None]


def _cross(width: float) -> np.ndarray:
    a, b = width, np.sqrt(1 - width**2)
    quarter = np.array([(a, a), (a, b), (-a, b)])
    return np.concatenate([_turn(quarter, turn * np.pi / 2) for turn in range(4)])


def _heart() -> np.ndarray:
    t = np.radians(np.linspace(0, 360, 80))
    y = -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    outline = np.stack([16 * np.sin(t) ** 3, y], 1)
    return outline / np.abs(outline).max()


def _moon() -> np.ndarray:
    outer, inner = _ellipse(1.0, -90, 90), _ellipse(1.0, 90, -90) * (0.35, 1.0)
    return np.concatenate([outer, inner])


def _arrow() -> np.ndarray:
    return np.array([(1, 0), (0.3, -0.6), (0.3, -0.2), (-0.9, -0.2), (-0.9, 0.2), (0.3, 0.2), (0.3, 0.6)])


# --- Textures: (H, W) in [0, 1], 0 and 1 standing for the two colours of an object. ---


def _sharp(wave: np.ndarray) -> np.ndarray:
    """A wave in [-1, 1] to nearly two tones, with soft edges that survive the small picture."""
    return np.clip(0.5 + 1.5 * wave, 0, 1)


def _stripes(at: Coordinates) -> np.ndarray:
    return _sharp(np.sin(2 * np.pi * 1.6 * at[1]))


def _bars(at: Coordinates) -> np.ndarray:
    return _sharp(np.sin(2 * np.pi * 1.6 * at[0]))


def _slanted(at: Coordinates) -> np.ndarray:
    return _sharp(np.sin(2 * np.pi * 1.2 * (at[0] + at[1])))


def _checks(at: Coordinates) -> np.ndarray:
    return _sharp(1.5 * np.sin(2 * np.pi * 1.1 * at[0]) * np.sin(2 * np.pi * 1.1 * at[1]))


def _dots(at: Coordinates) -> np.ndarray:
    return _sharp(np.cos(2 * np.pi * 1.5 * at[0]) + np.cos(2 * np.pi * 1.5 * at[1]) - 0.6)


def _rings(at: Coordinates) -> np.ndarray:
    return _sharp(np.cos(2 * np.pi * 2.0 * np.hypot(*at)))


def _rays(at: Coordinates) -> np.ndarray:
    return _sharp(np.sin(6 * np.arctan2(at[1], at[0])))


def _grid(at: Coordinates) -> np.ndarray:
    lines = np.maximum(np.cos(2 * np.pi * 1.5 * at[0]), np.cos(2 * np.pi * 1.5 * at[1]))
    return _sharp(2 * (lines - 0.6))


def _waves(at: Coordinates) -> np.ndarray:
    return _sharp(np.sin(2 * np.pi * (1.5 * at[1] + 0.25 * np.sin(2 * np.pi * 1.2 * at[0]))))


def _halves(at: Coordinates) -> np.ndarray:
    return _sharp(8 * at[0] * np.sign(at[1] + 1e-9))


@dataclass(frozen=True)
class _Kind:
    """What the objects of a class have in common."""

    outline: np.ndarray
    texture: Callable[[Coordinates], np.ndarray]
    hole: float = 0.0
    """Radius of a round hole in the middle."""


KINDS: dict[str, _Kind] = {
    "barred_heart": _Kind(_heart(), _bars),
    "checkered_square": _Kind(_polygon(4, 45), _checks),
    "dotted_triangle": _Kind(_polygon(3), _dots),
    "gridded_hexagon": _Kind(_polygon(6), _grid),
    "quartered_diamond": _Kind(_polygon(4) * (0.75, 1.0), _halves),
    "rayed_ring": _Kind(_ellipse(), _rays, hole=0.45),
    "ringed_star": _Kind(_star(5, 0.55), _rings),
    "slanted_cross": _Kind(_cross(0.38), _slanted),
    "striped_disc": _Kind(_ellipse(), _stripes),
    "wavy_pentagon": _Kind(_polygon(5), _waves),
}
"""The classes, in the order of their labels."""

_DISTRACTORS = (_ellipse(0.55), _moon(), _arrow(), _ellipse(0.2), _ellipse(1.0, 0, 180))


def write_planted(
    root: str | PathLike[str],
    *,
    seed: int = 0,
    size: int = 96,
    per_class_train: int = 200,
    per_class_val: int = 40,
) -> None:
    """Write the data set into ``root``.  Equal arguments give equal bytes; an image does not depend on the counts.

    size: side of the square images, in pixels.
    """
    root = Path(root)
    boxes, images = [], []
    for split, count in zip(_SPLITS, (per_class_train, per_class_val), strict=True):
        for label, name in enumerate(KINDS):
            folder, mask_folder = Path(split, name), Path("masks", split, name)
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / mask_folder).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                random = np.random.default_rng([seed, _SPLITS.index(split), label, index])
                picture, mask = draw(name, size, random)
                stem = f"{name}_{index:04d}"
                path, mask_path = folder / f"{stem}.jpg", mask_folder / f"{stem}.png"
                (root / path).write_bytes(simplejpeg.encode_jpeg(picture, quality=95, colorsubsampling="444"))
                _write_mask(root / mask_path, mask)
                boxes.append((path.as_posix(), name, *_bounds(mask), size, size))
                images.append((path.as_posix(), split, name, size, size, "RGB", 1, mask_path.as_posix(), MASK_VALUE))
    _write_table(root / "boxes.csv", "path,class,x0,y0,x1,y1,w,h", boxes)
    _write_table(root / "images.csv", "path,split,class,w,h,mode,n_boxes,mask_path,mask_value", images)


def draw(name: str, size: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture of a class: (size, size, 3) uint8 RGB, and its object's mask, (size, size) bool."""
    canvas = _background(size, random)
    for _ in range(random.integers(2, 5)):
        _draw_distractor(canvas, random)
    mask = _draw_object(canvas, KINDS[name], random)
    canvas *= _light(size, random)
    canvas += random.normal(0, 0.015, (size, size, 3))
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8), mask


def _background(size: int, random: np.random.Generator) -> np.ndarray:
    """(size, size, 3) float32 in [0, 1]: two colours mixed by noise of several octaves, a gradient and a grating."""
    x, y = _unit_grid(size)
    angle, frequency, phase = random.uniform(0, 2 * np.pi), random.uniform(2, 9), random.uniform(0, 2 * np.pi)
    across = x * np.cos(angle) + y * np.sin(angle)
    mix = random.uniform(0, 0.8) * across + random.uniform(0, 0.25) * np.sin(np.pi * frequency * across + phase)
    roughness = random.uniform(0.4, 0.8)
    for octave in range(2, 6):
        coarse = random.normal(0, roughness ** (octave - 1), (2**octave, 2**octave))
        mix = mix + cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    first = random.uniform(0.15, 0.85, 3)
    second = np.clip(first + random.uniform(-0.35, 0.35, 3), 0, 1)
    return _blend(first, second, np.clip(0.5 + 0.5 * mix, 0, 1)).astype(np.float32)


def _draw_distractor(canvas: np.ndarray, random: np.random.Generator) -> None:
    """Paint a small shape that belongs to no class, in two colours that run into each other."""
    size = len(canvas)
    outline = _DISTRACTORS[random.integers(len(_DISTRACTORS))]
    turned = _turn(outline, random.uniform(0, 2 * np.pi)) * random.uniform(0.08, 0.17) * size
    centre = random.uniform(0.05, 0.95, 2) * size
    alpha = _coverage(turned + centre, size)
    run = np.clip(0.5 + random.uniform(-2, 2) * (_unit_grid(size)[0] - centre[0] * 2 / size + 1), 0, 1)
    first, second = random.uniform(0, 1, (2, 3))
    canvas += alpha[..., None] * (_blend(first, second, run) - canvas)


def _draw_object(canvas: np.ndarray, kind: _Kind, random: np.random.Generator) -> np.ndarray:
    """Paint an object of a class and return its mask, (size, size) bool: the pixels that it covers at least half."""
    size = len(canvas)
    turned = _turn(kind.outline, tilt := random.uniform(-0.3, 0.3))
    low, high = turned.min(0), turned.max(0)
    share = np.exp(random.uniform(np.log(_MIN_AREA), np.log(_MAX_AREA)))
    radius = np.sqrt(share / (_area(kind.outline) - np.pi * kind.hole**2)) * size
    radius = min(radius, _MAX_BOX_SIDE * size / (high - low).max())
    centre = _place(low * radius, high * radius, size, random)
    alpha = _coverage(turned * radius + centre, size)
    if kind.hole:
        alpha *= 1 - _coverage(_ellipse() * kind.hole * radius + centre, size)
    steps = (np.arange(size, dtype=np.float32) + 0.5)[:, None]
    across, down = ((steps - centre) / radius).T
    x, y = np.meshgrid(across, down)
    texture = kind.texture((x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)))
    mask = alpha >= 0.5
    first, second = _two_colours(canvas[mask].mean(0), random)
    canvas += alpha[..., None] * (_blend(first, second, texture) - canvas)
    return mask


def _place(low: np.ndarray, high: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """A centre for an object reaching from ``low`` to ``high`` around it: inside the picture, away from its middle."""
    while True:
        centre = random.uniform(1 - low, size - 1 - high)
        middle = centre + (low + high) / 2 - size / 2
        if np.abs(middle).max() > 0.14 * size:
            return centre


def _two_colours(behind: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours (3,) of clearly different lightness, in either order, neither melting into what lies behind."""
    while True:
        first, second = random.uniform(0, 1, (2, 3))
        distinct = abs((first - second) @ (0.299, 0.587, 0.114)) > 0.4
        if distinct and min(np.linalg.norm(first - behind), np.linalg.norm(second - behind)) > 0.25:
            return first, second


def _light(size: int, random: np.random.Generator) -> np.ndarray:
    """(size, size, 1): brightness that changes slowly across the picture."""
    x, y = _unit_grid(size)
    angle = random.uniform(0, 2 * np.pi)
    slope = random.uniform(0, 0.25) * (x * np.cos(angle) + y * np.sin(angle))
    return (random.uniform(0.75, 1.1) * (1 + slope))[..., None]


def _blend(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """From colour ``first`` (3,) to ``second`` (3,) as ``share`` (H, W) goes from 0 to 1: (H, W, 3)."""
    return first + share[..., None] * (second - first)


@cache
def _unit_grid(size: int) -> Coordinates:
    """x and y of the pixel centres in [-1, 1], each (size, size)."""
    steps = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    x, y = np.meshgrid(steps, steps)
    return x, y


def _area(outline: np.ndarray) -> float:
    x, y = outline.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _coverage(outline: np.ndarray, size: int) -> np.ndarray:
    """(size, size) in [0, 1]: the share of each pixel inside an outline (n, 2) given in pixels."""
    fine = np.zeros((size * _OVERSAMPLING, size * _OVERSAMPLING), np.uint8)
    corners = np.rint((outline * _OVERSAMPLING - 0.5) * 16).astype(np.int32)  # in sixteenths; pixel centres are whole
    cv2.fillPoly(fine, [corners], 255, shift=4)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The box x0, y0, x1, y1 (exclusive) around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _write_mask(path: Path, mask: np.ndarray) -> None:
    picture = Image.fromarray(mask.astype(np.uint8) * MASK_VALUE)
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(path)


def _write_table(path: Path, header: str, rows: list[tuple[str | int, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split(","))
        writer.writerows(rows)

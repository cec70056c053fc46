"""Which decoder is the fastest exact one: JPEG to the input of a network, on one core.

    python -m tests.benchmarks.decoding_speed --images DIR [--size 224] [--rounds 5] [--out result.json]

Each way decodes and fits the same JPEGs of DIR, in turns; rates are medians over the rounds, as ratios to Pillow's.  Beside
each, how far its pixels are from Pillow's (decode, then antialiased bilinear resize), in grey levels on average.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from pipeline.data.decode import ImageError, decode_draft, decode_image
from pipeline.data.geometry import fit
from pipeline.data.listing import list_images

Way = Callable[[bytes, int], np.ndarray]


def pillow(data: bytes, size: int) -> np.ndarray:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def pillow_draft(data: bytes, size: int) -> np.ndarray:
    picture = Image.open(io.BytesIO(data))
    picture.draft("RGB", (size, size))
    return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def torchvision_io(data: bytes, size: int) -> np.ndarray:
    planes = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return functional.resize(planes, [size, size], antialias=True).permute(1, 2, 0).numpy()


def opencv(data: bytes, size: int) -> np.ndarray:
    image = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return fit(image, size, "squash")[0]


def opencv_area(data: bytes, size: int) -> np.ndarray:
    image = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def ours(data: bytes, size: int) -> np.ndarray:
    return fit(decode_image(data), size, "squash")[0]


def ours_draft(data: bytes, size: int) -> np.ndarray:
    return fit(decode_draft(data, size)[0], size, "squash")[0]


WAYS: dict[str, Way] = {
    "Pillow": pillow,
    "Pillow, draft": pillow_draft,
    "torchvision.io": torchvision_io,
    "OpenCV, torch's resize": opencv,
    "OpenCV, its area resize": opencv_area,
    "ours (simplejpeg, torch's resize)": ours,
    "ours, --draft": ours_draft,
}


def ordinary(data: bytes) -> bool:
    """Whether all ways understand a JPEG alike: whole, RGB and upright."""
    try:
        decode_image(data)
    except ImageError:
        return False
    picture = Image.open(io.BytesIO(data))
    return picture.mode == "RGB" and picture.getexif().get(0x0112, 1) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--most", type=int, default=200, help="images of DIR that are used")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    names = [path for path in list_images(flags.images).paths if Path(path).suffix.lower() in (".jpg", ".jpeg")]
    found = [(flags.images / name).read_bytes() for name in names[: flags.most]]
    images = [data for data in found if ordinary(data)]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(flags.rounds):
        for name, way in WAYS.items():
            begun = time.perf_counter()
            for data in images:
                way(data, flags.size)
            seconds[name].append(time.perf_counter() - begun)
    result = {}
    for name, way in WAYS.items():
        apart = [np.abs(way(data, flags.size).astype(float) - pillow(data, flags.size)).mean() for data in images]
        result[name] = {
            "times_pillow": round(statistics.median(seconds["Pillow"]) / statistics.median(seconds[name]), 2),
            "grey_levels_from_pillow": round(float(np.mean(apart)), 4),
        }
    megapixels = statistics.mean(np.prod(Image.open(io.BytesIO(data)).size) for data in images) / 1e6
    text = json.dumps({"images": len(images), "megapixels": round(float(megapixels), 3), "ways": result}, indent=1)
    print(text)
    if flags.out:
        flags.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Section 3b: annotation boxes to the 224-pixel input, cropped and squashed."""

from __future__ import annotations

import numpy as np

from pipeline.metrics.localisation import published_input_boxes
from tests.golden_checks._golden import GoldenFile


def check(golden: GoldenFile) -> None:
    pairs = zip(golden["size_wh"], golden["box_raw"], strict=True)
    found = [
        [published_input_boxes(box[None], width, height, 224, squash=squash)[0] for squash in (False, True)]
        for (width, height), box in pairs
    ]
    cropped, squashed = np.swapaxes(found, 0, 1)
    np.testing.assert_array_equal(cropped, golden["box_resized"])
    np.testing.assert_array_equal(squashed, golden["box_resized_squash"])

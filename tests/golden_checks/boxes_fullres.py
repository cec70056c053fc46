"""Section 3: threshold, largest component and box of noisy masks at full resolution."""

from __future__ import annotations

import numpy as np

from pipeline.metrics.boxes import binarize, largest_component, mask_box, mean_threshold
from tests.golden_checks._golden import GoldenFile, assert_close


def check(golden: GoldenFile) -> None:
    masks = golden["mask_u8"].astype(np.float32) / np.float32(255)
    size = masks.shape[-1]
    recorded = np.unpackbits(golden["binarized"], axis=-1).reshape(len(masks), size, size).astype(bool)
    for i, mask in enumerate(masks):
        assert_close(mean_threshold(mask, compat="published"), golden["threshold"][i], 1e-6, f"threshold {i}")
        binary = binarize(mask, compat="published")
        np.testing.assert_array_equal(binary, recorded[i], err_msg=f"binarized {i}")
        np.testing.assert_array_equal(binarize(mask), binary, err_msg=f"binarized {i}, not the published rule")
        assert largest_component(binary).sum() == golden["component_area"][i], f"component_area {i}"
        assert mask_box(mask, compat="published") == tuple(golden["box"][i]), f"box {i}"

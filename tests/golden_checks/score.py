"""Section 3: the localisation protocol, from mask to binarised mask, component, box, and all scores."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.baselines import box_maps, center_box, whole_box
from pipeline.metrics.boxes import binarize, binarize_quantile, largest_component, mask_box, mean_threshold
from pipeline.metrics.localisation import HIT_IOU, box_areas, box_ious, clip_boxes, soft_f1
from pipeline.metrics.masks import entropy, spread, total_variation
from pipeline.metrics.saliency_metric import SaliencyMetric, cut_out, saliency_metric
from pipeline.metrics.tally import Tally, Truth, maps_of, top_correct
from tests.golden_checks._golden import GoldenFile, assert_close
from tests.golden_checks._inputs import blocks, toy_logits

SIZE, CELLS = 224, 56
SYNTHETIC = 16
"""The recorded baselines are over the first images only: the published code fails on a last batch that is smaller."""
NAMES = {"avg_mask": "mask_mean", "std_mask": "mask_std"}


def check(golden: GoldenFile) -> None:
    masks = blocks(golden["mask_lr"].astype(np.float32) / np.float32(255))  # (20, 224, 224)
    x = torch.from_numpy(blocks(golden["x_lr"].astype(np.float32)))  # (20, 3, 224, 224)
    classify = partial(toy_logits, weight=golden["W_original"], bias=golden["b_original"])
    truths = [golden["gt_boxes"][golden["gt_image"] == image] for image in range(len(masks))]
    targets = torch.from_numpy(golden["y"])

    check_binary(golden, masks)
    check_boxes(golden, masks, truths)
    top1, top5 = check_classifier(golden, x, targets)
    saliency = check_saliency(golden, x, targets, classify)
    check_truth_saliency(golden, x, targets, classify, truths)
    check_results(golden, masks, truths, top1, top5, saliency)
    check_baselines(golden, x, targets, classify, truths)


def check_binary(golden: GoldenFile, masks: np.ndarray) -> None:
    recorded = {key: unpack(golden[key]) for key in ("binarized", "component", "binarized_quantile")}
    for i, mask in enumerate(masks):
        assert_close(mean_threshold(mask, compat="published"), golden["threshold"][i], 1e-6, f"threshold {i}")
        binary = binarize(mask, compat="published")
        np.testing.assert_array_equal(binary, recorded["binarized"][i], err_msg=f"binarized {i}")
        np.testing.assert_array_equal(largest_component(binary), recorded["component"][i], err_msg=f"component {i}")
        np.testing.assert_array_equal(binarize_quantile(mask), recorded["binarized_quantile"][i], err_msg=f"{i}")
        assert mask_box(mask) == tuple(golden["box_inclusive"][i]), f"box_inclusive {i}"


def check_boxes(golden: GoldenFile, masks: np.ndarray, truths: list[np.ndarray]) -> None:
    maps = maps_of(masks, SIZE, compat="published")
    np.testing.assert_array_equal(np.array(maps.boxes), golden["box"])
    np.testing.assert_array_equal(box_areas(np.array(maps.boxes)), golden["box_area"])
    order = np.argsort(golden["gt_image"], kind="stable")
    images = range(len(masks))
    ious = np.concatenate([box_ious(maps.boxes[i], truths[i], SIZE, compat="published") for i in images])
    f1 = np.concatenate([soft_f1(masks[i], truths[i], SIZE, compat="published") for i in images])
    assert_close(ious, golden["iou"][order], 1e-12, "iou")
    np.testing.assert_array_equal(ious > HIT_IOU, golden["hit"][order])
    assert_close(f1, golden["f1"][order], 1e-6, "f1")


def check_classifier(golden: GoldenFile, x: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    logits = toy_logits(x, golden["W_classifier"], golden["b_classifier"])
    assert_close(logits, golden["logits"], 1e-4, "logits")
    top1, top5 = top_correct(logits, targets)
    np.testing.assert_array_equal(top1, golden["is_correct"])
    return top1, top5


def check_saliency(golden: GoldenFile, x: Tensor, targets: Tensor, classify) -> SaliencyMetric:
    boxes = golden["box"].tolist()
    cuts = torch.stack([cut_out(image, box) for image, box in zip(x, boxes, strict=True)])
    assert_close(cuts.flatten(1)[:, golden["crop_sample_idx"]], golden["crop_sample"], 1e-4, "crop_sample")
    assert_close(classify(cuts), golden["crop_logits"], 1e-4, "crop_logits")
    found = saliency_metric(classify, x, boxes, targets)
    assert_close(found.sm1, golden["sm1"], 1e-4, "sm1")
    assert_close(found.sm2, golden["sm2"], 1e-4, "sm2")
    assert_close(found.sm1 - found.sm2, golden["sm"], 1e-4, "sm")
    assert_close(100 * found.correct.mean(), golden["sm_acc"], 1e-9, "sm_acc")
    return found


def check_truth_saliency(golden: GoldenFile, x: Tensor, targets: Tensor, classify, truths: list[np.ndarray]) -> None:
    count = len(golden["sm_gt"])
    found = [truth_saliency(classify, x[i], targets[i], visible(truths[i])) for i in range(count)]
    sm1, sm2 = np.array(found).T
    assert_close(sm1, golden["sm1_gt"], 1e-4, "sm1_gt")
    assert_close(sm2, golden["sm2_gt"], 1e-4, "sm2_gt")
    assert_close(sm1 - sm2, golden["sm_gt"], 1e-4, "sm_gt")


def check_results(
    golden: GoldenFile,
    masks: np.ndarray,
    truths: list[np.ndarray],
    top1: np.ndarray,
    top5: np.ndarray,
    saliency: SaliencyMetric,
) -> None:
    batch = int(golden["batch_size"])
    tally = Tally(size=SIZE, compat="published")
    for start, recorded in zip(range(0, len(masks), batch), golden.json("batch_stats_json"), strict=True):
        part = slice(start, start + batch)
        maps = maps_of(masks[part], SIZE, compat="published")
        truth = Truth(boxes=truths[part], masks=[None] * len(maps.masks), top1=top1[part], top5=top5[part])
        tally.add(maps, truth, SaliencyMetric(*(column[part] for column in saliency)))
        means = maps.masks.mean(axis=(1, 2), dtype=np.float64)
        assert_close(means.mean(), recorded["mask_avg"], 1e-6, "mask_avg")
        assert_close(spread(means, batch_size=batch, compat="published"), recorded["mask_std"], 1e-6, "mask_std")
        assert_close(entropy(maps.masks, compat="published").mean(), recorded["mask_entropy"], 1e-6, "mask_entropy")
        assert_close(total_variation(maps.masks, SIZE).mean(), recorded["mask_tv"], 1e-6, "mask_tv")
    compare(tally, golden.json("results_json"), batch)


def check_baselines(golden: GoldenFile, x: Tensor, targets: Tensor, classify, truths: list[np.ndarray]) -> None:
    recorded = golden.json("baselines_json")
    always = np.ones(SYNTHETIC, dtype=bool)
    truth = Truth(boxes=truths[:SYNTHETIC], masks=[None] * SYNTHETIC, top1=always, top5=always)
    for name, box in (("max", whole_box(SIZE)), ("center", center_box(SIZE))):
        maps = box_maps(box, SYNTHETIC, SIZE)
        tally = Tally(size=SIZE, compat="published")
        tally.add(maps, truth, saliency_metric(classify, x[:SYNTHETIC], maps.boxes, targets[:SYNTHETIC]))
        compare(tally, drop_absent(recorded.pop(name), "top1", "top5"), SYNTHETIC)

    absent = ("top1", "top5", "sm_acc", "binarized", "avg_mask", "std_mask", "entropy", "tv")
    expected = drop_absent(recorded.pop("ground_truth"), *absent)
    rows = [truth_row(classify, x[i], targets[i], truths[i]) for i in range(SYNTHETIC)]
    found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for name, value in expected.items():
        assert_close(found[name], value, 1e-4 if name.startswith("SM") else 1e-6, f"ground_truth {name}")
    assert not recorded, f"no baseline of this project stands for {sorted(recorded)}"


def drop_absent(recorded: dict[str, float], *names: str) -> dict[str, float]:
    """Leave out what the published code does not compute for a baseline, and writes as 0."""
    for name in names:
        assert recorded.pop(name) == 0.0, f"{name} of a baseline"
    return recorded


def truth_row(classify, x: Tensor, target: Tensor, boxes: np.ndarray) -> dict[str, float]:
    """The row of one image when each true box (k, 4), cut to the image, is the prediction for itself."""
    seen = visible(boxes)
    inside = boxes[box_areas(clip_boxes(boxes, SIZE)) > 0]
    whole = inside if len(inside) else seen
    own = [box_maps(tuple(box.tolist()), 1, SIZE) for box in seen]
    pairs = list(zip(own, whole[:, None], strict=True))
    f1 = np.array([soft_f1(maps.masks[0], box, SIZE, compat="published")[0] for maps, box in pairs])
    ious = [box_ious(maps.boxes[0], box, SIZE, compat="published")[0] for maps, box in pairs]
    sm1, sm2 = truth_saliency(classify, x, target, seen)
    miss = float(max(ious) <= HIT_IOU)
    return {"F1": f1.max(), "F1a": f1.mean(), "LE": miss, "OM": miss, "SM": sm1 - sm2, "SM1": sm1, "SM2": sm2}


def truth_saliency(classify, x: Tensor, target: Tensor, boxes: np.ndarray) -> tuple[float, float]:
    """Means of SM1 and SM2 over the true boxes of one image."""
    many = len(boxes)
    found = saliency_metric(classify, x.expand(many, -1, -1, -1), boxes.tolist(), target.expand(many))
    return found.sm1.mean(), found.sm2.mean()


def visible(boxes: np.ndarray) -> np.ndarray:
    """The boxes inside the image; the whole image when none is left."""
    clipped = clip_boxes(boxes, SIZE)
    clipped = clipped[box_areas(clipped) > 0]
    return clipped if len(clipped) else np.array([whole_box(SIZE)], dtype=np.int64)


def compare(tally: Tally, recorded: dict[str, float], batch: int) -> None:
    """Every recorded figure against the tally's; the published code writes the classifier's ones in per cent."""
    summary = tally.summary(batch_size=batch)
    for name, value in recorded.items():
        found = summary[NAMES.get(name, name)]
        assert found is not None, name
        scale = 100 if name in ("top1", "top5", "sm_acc") else 1
        assert_close(scale * found, value, 1e-4 if name.startswith("SM") else 1e-6, name)


def unpack(bits: np.ndarray) -> np.ndarray:
    """(20, 392) -> (20, 224, 224) bool."""
    cells = np.unpackbits(bits, axis=-1)[:, : CELLS * CELLS].reshape(-1, CELLS, CELLS).astype(bool)
    return blocks(cells)

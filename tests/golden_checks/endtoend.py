"""Section 1c: both sides through a toy classifier, in nine settings."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pipeline.fills import Zero, gaussian_blur
from pipeline.masking import mask_in, mask_out
from pipeline.objectives import SideConfig, side_loss
from tests.golden_checks._golden import GoldenFile, assert_close, assert_rows
from tests.golden_checks._inputs import blocks, sum_blocks, toy_logits

BLUR_SIGMA = 20.0


def check(golden: GoldenFile) -> None:
    x = torch.from_numpy(blocks(golden["x_lr"]))  # (8, 3, 224, 224)
    labels = torch.from_numpy(golden["y"])
    clean = toy_logits(x, golden["W"], golden["b"])
    assert_close(clean, golden["y_hat"], 1e-9, "y_hat")
    fills = {"none": None, "dummy": Zero(), "blur": gaussian_blur(x.float(), BLUR_SIGMA).double()}

    configs = golden.json("configs_json")
    sided = ("masked_{}_sample", "logits_{}", "mask_{}_loss", "classifier_loss_{}")
    results = [name.format(side) for name in sided for side in ("in", "out")]
    results += ["total", "classifier_loss_total", "grad_mask_block", "grad_mask_sample"]
    assert_rows(golden, len(configs), *results)
    for i, settings in enumerate(configs):
        tolerance = 1e-7 if settings["infill"] == "blur" else 1e-9  # the recorded blur is a float32 one
        what = f"{settings['name']}"
        mask = torch.from_numpy(blocks(golden["mask_lr"]))[:, None].requires_grad_()
        fill = fills[settings["infill"]]
        total, classifier_total = x.new_zeros(()), x.new_zeros(())
        sides = (("in", mask_in, settings["in_"]), ("out", mask_out, settings["out"]))
        for (side, operator, criterion), weight in zip(sides, settings["w"], strict=True):
            images = operator(x, mask, fill)
            logits = toy_logits(images, golden["W"], golden["b"])
            sample = images.flatten()[torch.from_numpy(golden["x_sample_idx"])]
            assert_close(sample, golden[f"masked_{side}_sample"][i], tolerance, f"masked_{side}_sample, {what}")
            assert_close(logits, golden[f"logits_{side}"][i], tolerance, f"logits_{side}, {what}")
            loss, cross_entropy = x.new_zeros(()), x.new_zeros(())
            if criterion is not None:
                objective, direction, lambda_area, lambda_tv = criterion
                config = SideConfig(
                    side=side,
                    objective=objective,
                    direction=direction,
                    lambda_area=lambda_area,
                    lambda_tv=lambda_tv or 0.0,
                )
                terms = side_loss(config, mask=mask, logits_masked=logits, logits_clean=clean, labels=labels)
                loss, cross_entropy = terms.total, F.cross_entropy(logits, labels)
            assert_close(loss, golden[f"mask_{side}_loss"][i], tolerance, f"mask_{side}_loss, {what}")
            assert_close(
                cross_entropy, golden[f"classifier_loss_{side}"][i], tolerance, f"classifier_loss_{side}, {what}"
            )
            total = total + weight * loss
            classifier_total = classifier_total + weight * cross_entropy
        assert_close(total, golden["total"][i], tolerance, f"total, {what}")
        assert_close(classifier_total, golden["classifier_loss_total"][i], tolerance, f"classifier_loss_total, {what}")
        total.backward()
        gradient = mask.grad
        assert gradient is not None
        assert_close(sum_blocks(gradient), golden["grad_mask_block"][i], tolerance, f"grad_mask_block, {what}")
        sample = gradient.flatten()[torch.from_numpy(golden["sample_idx"])]
        assert_close(sample, golden["grad_mask_sample"][i], tolerance, f"grad_mask_sample, {what}")

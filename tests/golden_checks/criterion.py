"""Section 1: the criterion of one side, its parts and its gradients, in 61 settings."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.objectives import SideConfig, mask_area, side_loss
from tests.golden_checks._golden import GoldenFile, assert_close, assert_rows
from tests.golden_checks._inputs import blocks, sum_blocks


def check(golden: GoldenFile) -> None:
    labels = torch.from_numpy(golden["y"])
    clean = torch.from_numpy(golden["y_hat"])
    target = torch.from_numpy(golden["use_p"])
    full = torch.from_numpy(blocks(golden["mask_lr"]))[:, None]  # (8, 1, 224, 224)
    assert_close(mask_area(full), golden["mask_mean"], 1e-9, "mask_mean")

    combos = golden.json("combos_json")
    assert_rows(
        golden, len(combos), "masker_loss", "objective_loss", "mask_reg", "tv_reg", "regularization", "grad_logits",
        "grad_mask_block", "grad_mask_sample", "grad_mask_sum", "grad_mask_sumsq",
    )  # fmt: skip
    for i, combo in enumerate(combos):
        masked_given = torch.from_numpy(golden["y_hat_masked"]).requires_grad_()
        mask = full.clone().requires_grad_()
        if combo["y_hat_log_softmax"]:
            logits_clean, logits_masked = clean.log_softmax(1), masked_given.log_softmax(1)
        else:
            logits_clean, logits_masked = clean, masked_given
        config = SideConfig(
            side={"mask_in": "in", "mask_out": "out"}[combo["mask_reg_mode"]],
            objective=combo["objective_type"],
            direction=combo["objective_direction"],
            lambda_area=combo["lambda_r"],
            lambda_tv=combo["lambda_tv"] or 0.0,
            area_distance=combo["prob_loss_func"],
        )
        terms = side_loss(
            config,
            mask=mask,
            logits_masked=logits_masked,
            logits_clean=logits_clean,
            labels=labels,
            target_area=target if combo["add_prob_layers"] else None,
        )
        what = f"setting {i}: {combo}"
        assert_close(terms.total, golden["masker_loss"][i], 1e-9, f"masker_loss, {what}")
        assert_close(terms.objective, golden["objective_loss"][i], 1e-9, f"objective_loss, {what}")
        assert_close(terms.area, golden["mask_reg"][i], 1e-9, f"mask_reg, {what}")
        assert_close(terms.tv, golden["tv_reg"][i], 1e-9, f"tv_reg, {what}")
        assert_close(terms.area + terms.tv, golden["regularization"][i], 1e-9, f"regularization, {what}")
        assert_close(terms.clean_right, golden["correct_on_clean"].astype(bool), 0, "correct_on_clean")
        assert_close(terms.masked_right, golden["correct_on_masked"].astype(bool), 0, "correct_on_masked")
        assert_close(~terms.masked_right, golden["mistaken_on_masked"].astype(bool), 0, "mistaken_on_masked")
        if config.side == "out":
            assert_close(terms.achieved, golden["nontrivially_confused"].astype(bool), 0, "nontrivially_confused")
        else:
            assert_close(terms.achieved, golden["correct_on_masked"].astype(bool), 0, "correct_on_masked")

        terms.total.backward()
        gradient = mask.grad
        assert gradient is not None and masked_given.grad is not None
        assert_close(masked_given.grad, golden["grad_logits"][i], 1e-9, f"grad_logits, {what}")
        assert_close(sum_blocks(gradient), golden["grad_mask_block"][i], 1e-9, f"grad_mask_block, {what}")
        sample = gradient.flatten()[torch.from_numpy(golden["sample_idx"])]
        assert_close(sample, golden["grad_mask_sample"][i], 1e-9, f"grad_mask_sample, {what}")
        assert_close(gradient.sum(), golden["grad_mask_sum"][i], 1e-9, f"grad_mask_sum, {what}")
        assert_close(gradient.square().sum(), golden["grad_mask_sumsq"][i], 1e-9, f"grad_mask_sumsq, {what}")

    for indicator in ("correct_on_clean", "correct_on_masked", "mistaken_on_masked", "nontrivially_confused"):
        assert set(np.unique(golden[indicator])) <= {0, 1}, indicator

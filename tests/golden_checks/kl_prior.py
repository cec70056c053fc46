"""Section 1b: the KL-to-prior criterion in 14 settings."""

from __future__ import annotations

import torch

from pipeline.objectives import KLPriorConfig, kl_prior_criterion
from tests.golden_checks._golden import GoldenFile, assert_close, assert_rows
from tests.golden_checks._inputs import blocks, sum_blocks


def check(golden: GoldenFile) -> None:
    full = torch.from_numpy(blocks(golden["mask_lr"]))[:, None]
    configs = golden.json("configs_json")
    results = ("masker_loss", "objective_loss", "regularization", "grad_logits", "grad_mask_block")
    assert_rows(golden, len(configs), *results)
    for i, settings in enumerate(configs):
        logits = torch.from_numpy(golden["y_hat_masked"]).requires_grad_()
        mask = full.clone().requires_grad_()
        config = KLPriorConfig(
            kl=settings["kl"],
            prior=settings["prior"],
            only_clean_right=bool(settings["loss_on_coc"]),
            class_weight=bool(settings["apply_class_weight"]),
            regularize_always=settings.get("regularize_always", False),
            nothing_class=settings.get("nothing_class"),
            nothing_class_area_weight=settings.get("nothing_class_reg_weight", 1.0),
            lambda_area=float(golden["lambda_r"]),
        )
        terms = kl_prior_criterion(
            config,
            mask=mask,
            logits_masked=logits,
            logits_clean=torch.from_numpy(golden["y_hat"]),
            labels=torch.from_numpy(golden["y"]),
            class_weights=torch.from_numpy(golden["class_weights"]),
        )
        terms.total.backward()
        what = f"setting {i}: {settings}"
        assert_close(terms.total, golden["masker_loss"][i], 1e-9, f"masker_loss, {what}")
        assert_close(terms.objective, golden["objective_loss"][i], 1e-9, f"objective_loss, {what}")
        assert_close(terms.area, golden["regularization"][i], 1e-9, f"regularization, {what}")
        assert logits.grad is not None and mask.grad is not None
        assert_close(logits.grad, golden["grad_logits"][i], 1e-9, f"grad_logits, {what}")
        assert_close(sum_blocks(mask.grad), golden["grad_mask_block"][i], 1e-9, f"grad_mask_block, {what}")

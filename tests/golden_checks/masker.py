"""Section 4: the masker's forward pass in ten settings, its gradients, and the binary concrete sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.concrete import ConcreteConfig, concrete_sample
from pipeline.masker import Masker
from pipeline.masking import upsample
from tests.golden_checks._golden import GoldenFile, assert_close
from tests.golden_checks._inputs import RESNET50_CHANNELS, check_weights, seeded_weights, thinned

SIZES = (56, 56, 28, 14, 7)


def build(case: dict[str, Any]) -> Masker:
    concrete = ConcreteConfig(mode=case["gumbel_output_mode"], shown="mode") if case.get("apply_gumbel") else None
    return Masker(
        taps={layer: RESNET50_CHANNELS[layer] for layer in case["use_layers"]},
        mask_size=(56, 56),
        target_area=case.get("add_prob_layers", False),
        class_count=1000 if case.get("add_class_ids") else None,
        concrete=concrete,
        upsample=case.get("final_upsample_mode", "nearest"),
    ).train(case["train"])


def features(case: dict[str, Any]) -> dict[int, Tensor]:
    stream = np.random.RandomState(case["feature_seed"])
    maps = {}
    for layer, size in enumerate(SIZES):
        shape = (case["batch"], RESNET50_CHANNELS[layer], size, size)
        array = np.maximum(stream.standard_normal(shape), 0).astype(np.float32)
        total = array.astype(np.float64).sum()
        assert abs(total - case["feature_sums"][layer]) < 1e-3, f"features of layer {layer}: sum {total}"
        maps[layer] = torch.from_numpy(array)
    return maps


def check(golden: GoldenFile) -> None:
    for i, case in enumerate(golden.json("cases_json")):
        _check_case(golden, i, case)
    _check_concrete(golden)


def _check_case(golden: GoldenFile, i: int, case: dict[str, Any]) -> None:
    masker = build(case)
    assert sum(p.numel() for p in masker.parameters() if p.requires_grad) == case["params"], f"case {i}: parameters"
    check_weights(seeded_weights(masker, case["weight_seed"]), case["weight_checks"])
    maps = features(case)
    extra: dict[str, Tensor] = {}
    if case.get("add_prob_layers"):
        extra["target_area"] = torch.from_numpy(golden[f"use_p_{i}"])
    if case.get("add_class_ids"):
        extra["labels"] = torch.from_numpy(golden[f"class_ids_{i}"])

    logits = masker(maps, **extra)
    masks = masker.masks(logits)
    full = upsample(masks, (224, 224), masker.upsample)
    if masker.upsample == "bilinear":
        assert_close(full[:1], golden[f"mask_{i}"], 2e-5, f"mask_{i}")
        full_logits = upsample(logits, (224, 224), masker.upsample)
        assert_close(full_logits[:1, :, ::7, ::7], golden[f"logit_{i}"], 1e-4, f"logit_{i}")
    else:
        assert_close(full[..., ::4, ::4], golden[f"mask_{i}"], 2e-5, f"mask_{i}")
        assert torch.equal(full, masks.repeat_interleave(4, -2).repeat_interleave(4, -1)), f"case {i}: not blocks"
        if not case.get("apply_gumbel") and not case["train"]:  # the others' logits are not recorded
            assert_close(logits, golden[f"logit_{i}"], 1e-4, f"logit_{i}")
    if case["train"]:
        full.square().mean().backward()
        state = masker.state_dict()
        for name, parameter in masker.named_parameters():
            assert parameter.grad is not None
            assert_close(thinned(parameter.grad, 5000), golden[f"trainGrad_{name}"], 2e-5, f"trainGrad_{name}")
        for name, _ in masker.named_buffers():
            assert_close(state[name], golden[f"trainStat_{name}"], 2e-5, f"trainStat_{name}")

    masker = build(case).double()  # afresh: a pass in train mode moved the statistics
    seeded_weights(masker, case["weight_seed"])
    with torch.no_grad():
        masks = masker.masks(masker({k: v.double() for k, v in maps.items()}, **extra))
    if masker.upsample == "bilinear":
        masks = upsample(masks, (224, 224), "bilinear")[:1, :, ::7, ::7]
    else:
        masks = masks[..., ::2, ::2]
    assert_close(masks, golden[f"mask_f64_{i}"], 2e-5, f"mask_f64_{i}")


def _check_concrete(golden: GoldenFile) -> None:
    outputs = [key for key in golden if key.startswith("gumbel_out_")]
    assert outputs
    for key in outputs:
        setting = key.removeprefix("gumbel_out_")  # tau0.1_hard0
        temperature, hard = setting.removeprefix("tau").split("_hard")
        logits = torch.from_numpy(golden["gumbel_logits"]).requires_grad_()
        uniform = torch.from_numpy(golden["gumbel_uniform"])
        sample = concrete_sample(logits, uniform, float(temperature), hard=hard == "1")
        assert_close(sample, golden[key], 1e-9, key)
        weights = torch.arange(sample.numel(), dtype=sample.dtype).reshape(sample.shape) / sample.numel()
        (sample * weights).sum().backward()
        assert logits.grad is not None
        assert_close(logits.grad, golden[f"gumbel_grad_{setting}"], 1e-9, f"gumbel_grad_{setting}")

"""Section 5: the layout of published checkpoints is the layout of the product's own networks and constants."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet50

from pipeline import published
from pipeline.backbone import Backbone
from pipeline.masker import Masker
from pipeline.model import build_masker
from pipeline.published import DEFAULT_OPTIONS, FINAL_COMMAND_LINE, FINAL_OPTIONS
from pipeline.spec import Tap
from tests.golden_checks._golden import GoldenJson


def check(golden: GoldenJson) -> None:
    assert tuple(golden["top_level_keys"]) == published.CHECKPOINT_KEYS
    assert golden["legacy"]["masker_key"].split()[0] == published.LEGACY_MASKER_KEY
    assert {"optimizer_classifier", "optimizer_masker"} <= set(golden["optimizers"])
    assert golden["epoch"].startswith("int") and "torch.save" in golden["file"]
    _check_options(golden["args"])

    with torch.device("meta"):
        classifier = resnet50(weights=None)
    record = golden["state_dict_classifier"]
    _check_tensors(classifier, record["tensors"], record["parameters"], "classifier")

    variants = golden["state_dict_masker"]
    assert variants
    for record in variants:
        _check_tensors(variant_masker(record["variant"]), record["tensors"], record["parameters"], record["variant"])


def variant_masker(variant: str) -> Masker:
    """The product's masker for a variant such as ``use_layers 3,4 with gumbel head``."""
    found = re.match(r"use_layers ([\d,]+)", variant)
    assert found, f"variant {variant!r} names no layers"
    options = {"masker_use_layers": found[1], "apply_gumbel": "gumbel" in variant}
    taps = [
        Tap(layer=layer, module=f"layer{layer}", channels=published.CHANNELS[layer], height=1, width=1)
        for layer in published.published_layers(options)
    ]
    tapped = Backbone(extractor=nn.Identity(), taps=taps, head=None, last_map=None)
    return build_masker(published.published_masker(options), tapped, mask_size=56, classes=1000)


def _check_tensors(network: nn.Module, tensors: list[dict[str, Any]], parameters: int, what: str) -> None:
    own = [
        {"key": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for name, value in network.state_dict().items()
    ]
    assert own == tensors, f"{what}: {[(a, b) for a, b in zip(own, tensors, strict=False) if a != b][:3]}"
    assert sum(p.numel() for p in network.parameters()) == parameters, f"{what}: parameters"


def _check_options(args: dict[str, Any]) -> None:
    fields = args["fields"]
    assert {f["name"] for f in fields if f["required"]} == set(published.REQUIRED_OPTIONS)
    assert all(f["default"] is None for f in fields if f["required"])
    recorded = {f["name"]: f["default"] for f in fields if not f["required"]}
    assert recorded == DEFAULT_OPTIONS, f"options: {recorded.items() ^ DEFAULT_OPTIONS.items()}"
    for name in ("masker_use_layers", "add_prob_layers", "add_class_ids", "apply_gumbel", "apply_gumbel_tau"):
        assert name in args["note"]
    assert args["final_FIX"] == FINAL_OPTIONS["fix"]
    assert args["final_CA"] == FINAL_OPTIONS["ca"]
    assert args["command_line_extra"] == FINAL_COMMAND_LINE

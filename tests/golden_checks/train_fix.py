"""Section 4b: three training steps of FIX, through the product's own step."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.area_price import AreaPriceConfig
from pipeline.backbone import BackboneOutput
from pipeline.fills import Zero
from pipeline.masker import Masker
from pipeline.masking import mask_in, mask_out, upsample
from pipeline.metrics import masks as mask_metrics
from pipeline.model import SaliencyModel
from pipeline.objectives import side_loss
from pipeline.presets import Optimisation, Preset
from pipeline.published import FINAL_OPTIONS, published_sides
from pipeline.step import Batch, JointStep
from tests.golden_checks._golden import GoldenFile, assert_close
from tests.golden_checks._inputs import RESNET50_CHANNELS, blocks, check_weights, seeded_weights, thinned

STATISTICS_TOLERANCE = 2e-5
"""Of running means and variances, which the README's 2e-6 for weights does not cover.

Adam divides by the size of the gradient, so a weight of next to no gradient moves by rounding error; its mean over a
thousand channels of features is up to 8e-6 off, in a plain transcription of the published step as well.
"""


class ToyBackbone(nn.Module):
    """The recording's frozen classifier with two tapped maps."""

    def __init__(self, golden: GoldenFile) -> None:
        super().__init__()
        for name in ("A3", "A4", "W", "b"):
            self.register_buffer(name, torch.from_numpy(golden[name]))

    def forward(self, x: Tensor) -> BackboneOutput:
        maps = {
            3: F.relu(F.conv2d(F.avg_pool2d(x, 16), self.get_buffer("A3")[:, :, None, None])),  # (N, 1024, 14, 14)
            4: F.relu(F.conv2d(F.avg_pool2d(x, 32), self.get_buffer("A4")[:, :, None, None])),  # (N, 2048, 7, 7)
        }
        logits = F.linear(maps[4].mean((2, 3)), self.get_buffer("W"), self.get_buffer("b"))
        return BackboneOutput(logits, maps)


def published_fix() -> Preset:
    """The published FIX run as a preset: fixed weights in the published units, no schedule within three steps."""
    sides = published_sides(FINAL_OPTIONS["fix"])
    return Preset(
        name="fix",
        summary="the published FIX",
        classifier="frozen",
        mask_in=sides.mask_in,
        mask_out=sides.mask_out,
        relative_units=False,
        price=AreaPriceConfig(rule="fixed", initial=1.0),
        optimisation=Optimisation(decay="steps", masker_rate=1e-3, weight_decay=1e-4, clip_norm=10.0),
    )


def check(golden: GoldenFile) -> None:
    masker = Masker(taps={layer: RESNET50_CHANNELS[layer] for layer in (3, 4)}, mask_size=(56, 56))
    check_weights(seeded_weights(masker, int(golden["weight_seed"])), golden.json("weight_checks_json"))
    backbone: Any = ToyBackbone(golden)
    model = SaliencyModel(backbone=backbone, masker=masker)
    step = JointStep(
        model=model,
        preset=published_fix(),
        fill=Zero(),
        blank=torch.zeros(1, 3, 224, 224),
        population=None,
        batchnorm="eval",
        trains_classifier=False,
        scratch=False,
    )
    logs = golden.json("logs_json")
    assert len(logs) == len(golden["x_lr"]) == len(golden["grad_norm_before_clip"])
    for s, recorded in enumerate(logs):
        batch = Batch(torch.from_numpy(blocks(golden["x_lr"][s].astype(np.float32))), torch.from_numpy(golden["y"][s]))
        rehearsal = copy.deepcopy(step)  # leaves the real step's BatchNorm statistics alone
        gradients, _ = rehearsal.gradients(
            rehearsal.losses(batch, divisor=len(batch.labels), phase="joint", drawn=None)
        )
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert_close(norm, golden["grad_norm_before_clip"][s], 1e-4, f"grad_norm_before_clip, step {s}")
        _check_logs(copy.deepcopy(step), batch, recorded, s)

        told = step(batch, step=s, divisor=len(batch.labels), phase="joint", course=0.1)
        assert abs(told["masker_loss"] - recorded["masked_total___loss"]) < 1e-4, f"step {s}: the step's own loss"
        for name, value in masker.state_dict().items():
            tolerance = STATISTICS_TOLERANCE if "running" in name else 2e-6
            assert_close(thinned(value, 2000), golden[f"step{s}_{name}"], tolerance, f"step{s}_{name}")


def _check_logs(step: JointStep, batch: Batch, recorded: dict[str, Any], s: int) -> None:
    """The recorded numbers of one step, from the product's operators, criteria and metrics."""
    x, labels = batch.images, batch.labels
    model = step.model.train()
    with torch.no_grad():
        clean, native = model(x)
        mask = upsample(native, (224, 224), model.masker.upsample)
        logits = {"in": model.backbone(mask_in(x, mask)).logits, "out": model.backbone(mask_out(x, mask)).logits}
    cells = native[:, 0].numpy()
    found = {
        "epoch": None,
        "i": s,
        "classifier_loss": F.cross_entropy(clean, labels),
        "acc": 100 * (clean.argmax(1) == labels).double().mean(),
        "mask_avg": cells.mean(),
        "mask_std": mask_metrics.spread(cells.mean((1, 2)), batch_size=len(cells)),
        "mask_entropy": mask_metrics.entropy(cells, compat="published").mean(),
        "mask_tv": mask_metrics.total_variation(cells, 224).mean(),
    }
    classifier_total, total = 0.0, 0.0
    for side, config in (("in", step.preset.mask_in), ("out", step.preset.mask_out)):
        assert config is not None
        terms = side_loss(config, mask=mask, logits_masked=logits[side], logits_clean=clean, labels=labels)
        cross_entropy = F.cross_entropy(logits[side], labels)
        found |= {
            f"masked_{side}___classifier_loss": cross_entropy,
            f"masked_{side}___acc": 100 * terms.masked_right.double().mean(),
            f"masked_{side}___mask_reg": terms.area,
        }
        if side == "in":
            found["masked_in___correct_on_masked"] = terms.achieved.double().mean()
        else:
            found["masked_out___mistaken_on_masked"] = (~terms.masked_right).double().mean()
            found["masked_out___nontrivially_confused"] = terms.achieved.double().mean()
        classifier_total += float(cross_entropy)
        total += float(terms.total)
    found |= {"masked_total___classifier_loss": classifier_total, "masked_total___loss": total}
    assert found.keys() == recorded.keys(), f"step {s}: logs {found.keys() ^ recorded.keys()}"
    for name, value in recorded.items():
        if value is None:
            assert found[name] is None, f"step {s}: {name}"
        else:
            assert_close(float(found[name]), value, 1e-4, f"step {s}: {name}")

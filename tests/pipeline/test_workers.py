"""One, two and four workers with the same global batch and seed give the same weights and tell the same figures."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline import collective
from pipeline.allocator import keep_freed_memory
from pipeline.backbone import choose_taps, create_classifier, pyramid, tap_classifier
from pipeline.batchnorm import SyncedBatchNorm2d, synchronise
from pipeline.data.batches import step_indices
from pipeline.fills import Zero
from pipeline.model import SaliencyModel, build_masker
from pipeline.population import Population, PopulationConfig
from pipeline.presets import PRESETS
from pipeline.spec import MaskerSpec
from pipeline.step import Batch, JointStep

SIZE, CLASSES, IMAGES, BATCH, STEPS = 32, 4, 24, 9, 20
"""Nine pictures a step: shares of 5 and 4, and of 3, 2, 2 and 2."""
WORLDS = (1, 2, 4)


def _train_in_each(rank: int, folder: str) -> None:
    """A process takes part in one world after the other, so that four have to be started and not seven."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for world in WORLDS:
        if rank < world:
            _train(rank, world, folder)


def _train(rank: int, world: int, folder: str) -> None:
    """Twenty joint steps of `ca` in float64 on seeded noise; rank 0 saves the weights."""
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1"}
        store = dist.FileStore(f"{folder}/store{world}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    classifier = create_classifier("timm", "test_resnet", outputs=CLASSES, arguments={})
    maps = pyramid("timm", classifier, SIZE)
    backbone = tap_classifier("timm", classifier, choose_taps(maps, (1, 2)), last_map=maps[-1].module)
    synchronise(backbone)
    masker = build_masker(MaskerSpec(), backbone, mask_size=8, classes=CLASSES, norm=SyncedBatchNorm2d)
    model = SaliencyModel(backbone=backbone, masker=masker)
    step_of = JointStep(
        model=model,
        preset=PRESETS["ca"],
        fill=Zero(),
        blank=torch.zeros(1, 3, SIZE, SIZE),
        population=Population(config=PopulationConfig(probability=0.5, save_every=3, size=2), seed=0),
        batchnorm="sync",
        trains_classifier=True,
        scratch=True,
    )
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, IMAGES)
    pictures = torch.from_numpy(random.standard_normal((IMAGES, 3, SIZE, SIZE)) + labels[:, None, None, None])
    logs = []
    for step in range(STEPS):
        share = step_indices(IMAGES, seed=0, step=step, batch_size=BATCH)[rank::world]
        batch = Batch(pictures[share], torch.from_numpy(labels[share]))
        phase = "classifier" if step < 4 else "joint"
        logs.append(step_of(batch, step=step, divisor=BATCH, phase=phase, course=step / STEPS))
    if rank == 0:
        state = {"model": model.state_dict(), "price": asdict(step_of.price), "logs": logs}
        torch.save(state, f"{folder}/world{world}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.timeout(900)
def test_same_weights_for_one_two_and_four_workers(tmp_path: Path) -> None:
    mp.spawn(_train_in_each, args=(str(tmp_path),), nprocs=max(WORLDS))
    states = {w: torch.load(tmp_path / f"world{w}.pt", weights_only=True) for w in WORLDS}
    for world in WORLDS[1:]:
        assert states[world]["price"] == pytest.approx(states[1]["price"], abs=1e-8)
        for one, other in zip(states[1]["logs"], states[world]["logs"], strict=True):
            assert other == pytest.approx(one, abs=1e-8), "figures of a step are over all its pictures"
        for name, value in states[1]["model"].items():
            assert torch.allclose(states[world]["model"][name], value, atol=1e-8, rtol=0), name


def _norm(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    x = torch.load(f"{folder}/x.pt", weights_only=True)
    layer = SyncedBatchNorm2d(5).double()
    share = (x[:2] if rank == 0 else x[2:]).requires_grad_(True)  # 2 and 5 images: uneven shares
    out = layer(share)
    collective.differentiable_sum((out * torch.arange(out.shape[1])[None, :, None, None]).square().sum())
    (gradient,) = torch.autograd.grad((out * torch.arange(5.0)[None, :, None, None]).square().sum(), share)
    torch.save({"out": out.detach(), "grad": gradient, "var": layer.running_var}, f"{folder}/part{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(600)
def test_synchronised_batchnorm_equals_one_over_the_whole_batch(tmp_path: Path) -> None:
    x = torch.randn(7, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x.pt")
    mp.spawn(_norm, args=(2, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"part{rank}.pt", weights_only=True) for rank in (0, 1)]

    def reference(images: Tensor) -> tuple[Tensor, nn.BatchNorm2d]:
        layer = nn.BatchNorm2d(5).double()
        return layer(images), layer

    whole = x.clone().requires_grad_(True)
    out, layer = reference(whole)
    (gradient,) = torch.autograd.grad((out * torch.arange(5.0)[None, :, None, None]).square().sum(), whole)
    assert torch.allclose(torch.cat([part["out"] for part in parts]), out, atol=1e-12)
    assert torch.allclose(torch.cat([part["grad"] for part in parts]), gradient, atol=1e-10)
    assert torch.allclose(parts[0]["var"], layer.running_var, atol=1e-12)

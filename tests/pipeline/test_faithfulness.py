"""Faithfulness figures against classifiers whose evidence is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.metrics.faithfulness import FAITHFULNESS, Faithfulness, Protocol

SIZE = 16


def corner(x: Tensor) -> Tensor:
    """Logits (N, 3): class 1 is what is bright in the upper left quarter."""
    evidence = x[:, :, : SIZE // 2, : SIZE // 2].mean((1, 2, 3))
    return torch.stack([torch.zeros_like(evidence), 8 * evidence, torch.full_like(evidence, -2.0)], dim=1)


def figures(classify, masks: list[np.ndarray], protocol: Protocol | None = None, objects=None) -> dict:
    gathered = Faithfulness(protocol or Protocol(steps=16))
    count = len(masks)
    gathered.add(
        classify,
        torch.ones(count, 3, SIZE, SIZE),
        np.stack(masks).astype(np.float32),
        labels=np.zeros(count, dtype=int),
        targets=torch.ones(count, dtype=torch.long),
        objects=objects or [None] * count,
    )
    return gathered.summary()


def quarter(row: int, column: int) -> np.ndarray:
    mask = np.zeros((4, 4))
    mask[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1
    return mask


def test_the_map_of_the_evidence_beats_the_map_beside_it() -> None:
    right, wrong = figures(corner, [quarter(0, 0)]), figures(corner, [quarter(1, 1)])
    assert tuple(right) == FAITHFULNESS
    assert right["insertion"] > wrong["insertion"]
    assert right["deletion"] < wrong["deletion"]
    assert right["average_drop"] == pytest.approx(0, abs=1e-6) and wrong["average_drop"] > 0.4
    assert right["completeness"] > wrong["completeness"]
    assert right["pointing"] is None


def test_curves_by_hand() -> None:
    # p of class 1 is a step: full evidence after the first quarter of the pixels, half of it after an eighth.
    found = figures(corner, [quarter(0, 0)], Protocol(steps=4))
    p = [corner(torch.full((1, 3, SIZE, SIZE), value)).softmax(1)[0, 1].item() for value in (0.0, 1.0)]
    assert found["deletion"] == pytest.approx((p[1] / 2 + 3.5 * p[0]) / 4, abs=1e-6)
    assert found["completeness"] == pytest.approx((p[0] / 2 + 3.5 * p[1]) / 4 / p[1], abs=1e-6)


def test_a_constant_classifier_is_sound_and_neither_drops_nor_gains() -> None:
    found = figures(lambda x: x.new_tensor([[1.0, 2.0, 0.0]]).expand(len(x), -1), [quarter(0, 0), quarter(1, 0)])
    assert found["soundness"] == pytest.approx(1.0)
    assert found["average_drop"] == found["average_gain"] == found["increase"] == 0.0
    assert found["insertion"] == pytest.approx(found["deletion"])


def test_a_map_that_makes_up_evidence_is_unsound() -> None:
    def ghost(x: Tensor) -> Tensor:  # class 2 is seen where only a quarter is left
        kept = (x != 0).float().mean((1, 2, 3))
        return torch.stack([torch.zeros_like(kept), 6 * (kept > 0.9), 12 * ((kept > 0.1) & (kept < 0.9))], dim=1)

    assert figures(ghost, [quarter(0, 0)])["soundness"] < 0.3


def test_pointing_has_a_tolerance() -> None:
    there = np.zeros((SIZE, SIZE), dtype=bool)
    there[:8, :8] = True
    near, far = quarter(0, 0), quarter(1, 1)
    assert figures(corner, [near, near], objects=[there, None])["pointing"] == 1.0
    assert figures(corner, [far], objects=[there])["pointing"] == 0.0
    assert figures(corner, [far], Protocol(steps=1, tolerance=1.0), objects=[there])["pointing"] == 1.0


def test_equal_cells_are_taken_in_random_order_by_the_seed() -> None:
    flat = [np.ones((4, 4))]
    first, again, other = (figures(corner, flat, Protocol(steps=8, seed=seed)) for seed in (0, 0, 1))
    assert first["deletion"] == again["deletion"] != other["deletion"]


@pytest.mark.parametrize("wrong", [{"class_rule": "any"}, {"scaling": "max"}, {"fill": "lava"}, {"steps": 0}])
def test_an_impossible_protocol_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Protocol(**wrong)

"""Masked-in and masked-out images, and native masks brought to the size of the image."""

from __future__ import annotations

import pytest
import torch

from pipeline.fills import FILLS, Blur, make_fill
from pipeline.masking import mask_in, mask_out, upsample
from pipeline.metrics import masks as maskmetrics


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masks() -> torch.Tensor:
    return torch.rand(3, 1, 16, 20, generator=torch.Generator().manual_seed(1))


def test_the_two_images_are_complements(images, masks) -> None:
    torch.testing.assert_close(mask_in(images, masks) + mask_out(images, masks), images)
    fill = torch.randn_like(images)
    torch.testing.assert_close(mask_in(images, masks, fill) + mask_out(images, masks, fill), images + fill)


def test_a_full_mask_keeps_the_image_and_an_empty_one_shows_the_fill(images) -> None:
    fill = Blur(sigma=1.5)
    content = fill.content(images, images[:, :1])
    full, empty = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    torch.testing.assert_close(mask_in(images, full, fill), images)
    torch.testing.assert_close(mask_out(images, empty, fill), images)
    torch.testing.assert_close(mask_in(images, empty, fill), content)
    torch.testing.assert_close(mask_out(images, full, fill), content)


def test_the_gradient_of_the_mask_sees_the_fill_but_the_fill_has_none(images, masks) -> None:
    fill = torch.randn_like(images).requires_grad_()
    masks.requires_grad_()
    mask_in(images, masks, fill).sum().backward()
    assert fill.grad is None and masks.grad is not None
    torch.testing.assert_close(masks.grad, (images - fill).sum(1, keepdim=True).detach())


@pytest.mark.parametrize("name", sorted(set(FILLS) - {"user", "colour", "black"}))
def test_every_fill_lets_a_gradient_through_to_the_mask(images, masks, name: str) -> None:
    masks.requires_grad_()
    mask_out(
        images, masks, make_fill(name, {}, mean=3 * (0.5,), std=3 * (0.25,)), torch.Generator().manual_seed(5)
    ).square().sum().backward()
    assert masks.grad is not None and masks.grad.abs().sum() > 0


def test_upsampling(masks) -> None:
    nearest = upsample(masks, (64, 80))
    assert torch.equal(nearest, masks.repeat_interleave(4, 2).repeat_interleave(4, 3))
    odd = upsample(masks, (50, 50))
    expected = maskmetrics.upsample_nearest(masks.numpy(), 50)
    assert torch.equal(odd, torch.from_numpy(expected))
    bilinear = upsample(masks, (64, 80), "bilinear")
    expected = torch.nn.functional.interpolate(masks, size=(64, 80), mode="bilinear", align_corners=False)
    assert torch.equal(bilinear, expected) and not torch.equal(bilinear, nearest)

"""Each fill does what its name says."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from pipeline.errors import UsageError
from pipeline.fills import FILLS, Fill, LocalMean, User, gaussian_blur, gaussian_kernel, make_fill

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 18, 22, generator=torch.Generator().manual_seed(0))


def hidden(images: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(images), 1, *images.shape[2:])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_blur_agrees_with_an_independent_filter(images) -> None:
    kernel = gaussian_kernel(2.3)
    assert kernel.numel() == 2 * 10 + 1 and kernel.sum().item() == pytest.approx(1)
    expected = images.double().numpy()
    for axis in (2, 3):
        expected = ndimage.correlate1d(expected, kernel.numpy(), axis=axis, mode="constant")
    np.testing.assert_allclose(gaussian_blur(images, 2.3).numpy(), expected, atol=1e-5)


def test_colours_are_stated_before_normalisation(images) -> None:
    black = FILLS["black"](mean=MEAN, std=STD).apply(images, hidden(images))
    pixels = black * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    torch.testing.assert_close(pixels, torch.zeros_like(pixels), atol=1e-6, rtol=0)
    mean = FILLS["colour"](rgb=MEAN, mean=MEAN, std=STD).apply(images, hidden(images))
    torch.testing.assert_close(mean, FILLS["zero"]().apply(images, hidden(images)))


def test_pyramid_goes_from_sharp_to_blurred_without_jumps(images) -> None:
    fill = FILLS["pyramid"](sigma=3.0, levels=4)
    at = [fill.apply(images, torch.full((4, 1, 18, 22), keep)) for keep in (1.0, 2 / 3, 0.5, 1 / 3, 0.0)]
    torch.testing.assert_close(at[0], images)
    torch.testing.assert_close(at[1], gaussian_blur(images, 1.0))
    torch.testing.assert_close(at[2], (gaussian_blur(images, 1.0) + gaussian_blur(images, 2.0)) / 2)
    torch.testing.assert_close(at[3], gaussian_blur(images, 2.0))
    torch.testing.assert_close(at[4], gaussian_blur(images, 3.0))


def test_local_mean_knows_only_kept_pixels(images) -> None:
    keep = (torch.rand(4, 1, 18, 22, generator=seeded()) > 0.5).float()
    spoiled = torch.where(keep == 0, torch.full_like(images, 100.0), images)
    content = LocalMean(window=5).content(spoiled, keep)
    torch.testing.assert_close(content, LocalMean(window=5).content(images, keep))
    rows, columns = slice(4, 9), slice(6, 11)
    kept = keep[0, 0, rows, columns] == 1
    expected = images[0, :, rows, columns][:, kept].mean(1)
    torch.testing.assert_close(content[0, :, 6, 8], expected, atol=1e-4, rtol=0)


def test_local_mean_of_a_window_without_kept_pixels_is_the_images_mean() -> None:
    images, keep = torch.full((1, 1, 40, 40), 7.0), torch.zeros(1, 1, 40, 40)
    keep[..., :3, :3] = 1
    images[..., 3:, :] = 99.0
    images[..., :3, 3:] = 99.0
    torch.testing.assert_close(LocalMean().content(images, keep)[..., -1, -1], torch.full((1, 1), 7.0))
    assert LocalMean().content(images, torch.zeros_like(keep)).isfinite().all()


def test_noise_is_seeded_and_scaled(images) -> None:
    fill = FILLS["noise"](scale=0.5)
    first, again, other = (fill.apply(images, hidden(images), seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.5, rel=0.05)


def test_others_never_show_the_image_itself(images) -> None:
    for seed in range(20):
        content = FILLS["others"]().apply(images, hidden(images), seeded(seed))
        for image, filled in zip(images, content, strict=True):
            assert not torch.equal(image, filled)
            assert any(torch.equal(filled, other) for other in images)
    with pytest.raises(ValueError, match="at least 2"):
        FILLS["others"]().apply(images[:1], hidden(images[:1]))


class Halves(torch.nn.Module):
    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return x * 0.5 + keep


def test_a_users_fill_from_a_function_and_from_torchscript(images, tmp_path: Path) -> None:
    torch.jit.script(Halves()).save(str(tmp_path / "fill.pt"))
    made = FILLS["user"](path=tmp_path / "fill.pt"), FILLS["user"](function=halved)
    for fill in (User(function=Halves()), *made, FILLS["user"](function=f"{__name__}:halved")):
        torch.testing.assert_close(fill.apply(images, hidden(images)), images * 0.5)
    with pytest.raises(ValueError, match="gave images of shape"):
        User(function=lambda x, keep: x[:1]).apply(images, hidden(images))
    for options, message in (
        ({}, "give fill_options.path=FILE"),
        ({"function": "nowhere:inpaint"}, "no function nowhere:inpaint"),
        ({"function": "inpaint"}, "no function inpaint"),
        ({"function": "math:pi"}, "math:pi is no function"),
    ):
        with pytest.raises(UsageError, match=message):
            make_fill("user", options, mean=MEAN, std=STD)


def halved(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return x * 0.5


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_users_file_that_is_no_torchscript_is_refused(tmp_path: Path) -> None:
    bait = tmp_path / "owned"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Hostile(f"touch {bait}")))
    torch.save(Hostile(f"touch {bait}"), tmp_path / "saved.pt")
    for name in ("evil.pt", "saved.pt", "none.pt"):
        with pytest.raises(UsageError, match="is not TorchScript"):
            User.load(path=tmp_path / name)
    assert not bait.exists()


def test_wrong_settings_are_quoted() -> None:
    for name, options in (("blur", {"sigma": 0}), ("pyramid", {"levels": 1}), ("local-mean", {"window": 4})):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            FILLS[name](**options)
    with pytest.raises(NotImplementedError):
        Fill().apply(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


def test_the_random_mixture_is_drawn_for_every_image() -> None:
    """Half of the images are blurred, the others flat with noise; what stays visible is almost the picture."""
    from pipeline.fills import RandomMixture

    x = torch.randn(40, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    fill = RandomMixture(std=(0.5, 0.5, 0.5))  # normalised space is that of pixels in [-1, 1]
    hidden = fill.content(x, torch.zeros(40, 1, 24, 24), torch.Generator().manual_seed(1))
    blurred = gaussian_blur(x, 11.0)
    is_blurred = [bool(torch.equal(one, two)) for one, two in zip(hidden, blurred, strict=True)]
    assert 10 < sum(is_blurred) < 30
    flat = torch.stack([image for image, blur in zip(hidden, is_blurred, strict=True) if not blur])
    assert flat.mean((2, 3)).abs().max() < 0.33 + 0.05
    assert 0.09 < (flat - flat.mean((2, 3), keepdim=True)).std() < 0.13
    shown = fill.apply(x, torch.ones(40, 1, 24, 24), torch.Generator().manual_seed(1))
    assert 0.02 < (shown - x).std() < 0.04
    again = fill.content(x, torch.zeros(40, 1, 24, 24), torch.Generator().manual_seed(1))
    assert torch.equal(again, hidden)


def test_the_random_mixture_is_stated_in_pixels() -> None:
    """The published spread, noise and visible noise are on a scale of [-1, 1], whatever the data's spread is."""
    x, everything = torch.zeros(200, 3, 8, 8), torch.ones(200, 1, 8, 8)
    found = []
    for std in (STD, (0.5, 0.5, 0.5)):
        fill = make_fill("random", {}, mean=MEAN, std=std)
        given = fill.content(x, everything, seeded()), fill.apply(x, everything, seeded())
        found.append([image * torch.tensor(std)[:, None, None] for image in given])  # on the scale of 0 to 1
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    assert 2 * found[0][0].abs().amax() > 0.33 and 2 * found[0][1].std().item() == pytest.approx(0.03, rel=0.1)

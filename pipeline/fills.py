"""Fills: what replaces the pixels that a mask hides.  Each is a named option; see ``FILLS``.

Images x are (N, C, H, W), normalised; ``keep`` (N, 1, H, W) in [0, 1] is the share of each pixel that stays visible:
the mask for a masked-in image, one minus the mask for a masked-out one.  Fills carry no gradient of their own; the
blend with ``keep`` does.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UsageError


def gaussian_kernel(sigma: float) -> Tensor:
    """exp(-k^2 / (2 sigma^2)) for |k| <= ceil(4 sigma), summing to 1; shape (2 * ceil(4 sigma) + 1,), float64."""
    radius = math.ceil(4 * sigma)
    k = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-k.square() / (2 * sigma**2))
    return kernel / kernel.sum()


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of every channel with zero padding; same shape."""
    return _separable(x, gaussian_kernel(sigma).to(x))


def _separable(x: Tensor, kernel: Tensor) -> Tensor:
    channels, radius = x.shape[1], kernel.numel() // 2
    weight = kernel.expand(channels, 1, -1)  # (C, 1, k): one filter per channel
    x = F.conv2d(x, weight[:, :, :, None], padding=(radius, 0), groups=channels)
    return F.conv2d(x, weight[:, :, None, :], padding=(0, radius), groups=channels)


class Fill:
    """Base of all fills: says what is put in the place of hidden pixels."""

    def content(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images that replace x where ``keep`` is 0; broadcastable to x."""
        raise NotImplementedError

    def apply(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x*keep + content*(1-keep); the content carries no gradient."""
        with torch.no_grad():
            content = self.content(x, keep, generator)
        return x * keep + content * (1 - keep)


class Zero(Fill):
    """The mean colour of the data, which is zero in normalised space (published)."""

    def content(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x.new_zeros(())

    def apply(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x * keep


class Colour(Fill):
    """One colour: ``rgb`` in [0, 1] per channel, brought to normalised space with the data's ``mean`` and ``std``."""

    def __init__(self, *, rgb: Sequence[float], mean: Sequence[float], std: Sequence[float]) -> None:
        self.value = [(c - m) / s for c, m, s in zip(rgb, mean, std, strict=True)]

    def content(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x.new_tensor(self.value)[None, :, None, None]  # (1, C, 1, 1)


class Blur(Fill):
    """The same image blurred; the published sigma is 20 pixels at 224."""

    def __init__(self, *, sigma: float = 20.0) -> None:
        if not sigma > 0:
            raise ValueError(f"blur sigma {sigma}: use a number of pixels above 0")
        self.sigma = sigma

    def content(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return gaussian_blur(x, self.sigma)


class BlurPyramid(Fill):
    """``levels`` images from sharp to ``sigma``; ``keep`` selects a pixel's level, linearly between two.

    Extremal perturbations use it (Fong, Patrick and Vedaldi 2019): a half-kept pixel is half as blurred rather than
    half hidden.
    """

    def __init__(self, *, sigma: float = 20.0, levels: int = 8) -> None:
        if levels < 2:
            raise ValueError(f"blur pyramid of {levels} levels: use at least 2")
        self.sigma = sigma
        self.levels = levels

    def content(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return gaussian_blur(x, self.sigma)

    def apply(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            sigmas = [self.sigma * level / (self.levels - 1) for level in range(1, self.levels)]
            blurred = [gaussian_blur(x, sigma) for sigma in sigmas]
        position = (1 - keep) * (self.levels - 1)  # 0 sharp ... levels-1 most blurred
        result = x * F.relu(1 - position)
        for level, image in enumerate(blurred, start=1):
            result = result + image * F.relu(1 - (position - level).abs())  # hat functions that sum to 1
        return result


class LocalMean(Fill):
    """The mean of the kept pixels in a window around each pixel; the image's kept mean where a window keeps nothing."""

    def __init__(self, *, window: int = 15) -> None:
        if window < 1 or window % 2 == 0:
            raise ValueError(f"local mean window {window}: use an odd number of pixels")
        self.window = window

    def content(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        keep = keep.expand(-1, 1, *x.shape[2:])
        ones = x.new_ones(self.window)
        total = _separable(x * keep, ones)
        weight = _separable(keep.to(x), ones)
        everywhere = (x * keep).sum((2, 3), keepdim=True) / keep.sum((2, 3), keepdim=True).clamp_min(1e-6)
        return torch.where(weight > 1e-3, total / weight.clamp_min(1e-3), everywhere)


class Noise(Fill):
    """Gaussian noise around the mean colour; ``scale`` 1 is the spread of the data.  Seeded by the generator."""

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale = scale

    def content(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.scale * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


class Others(Fill):
    """Another image of the batch, never the image itself: the batch rotated by a random number of places."""

    def content(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        count = x.shape[0]
        if count < 2:
            raise ValueError("fill 'others' takes images from the same batch; use batches of at least 2 images")
        where = generator.device if generator is not None else x.device
        places = int(torch.randint(1, count, (), generator=generator, device=where))
        return x.roll(places, dims=0)


class RandomMixture(Fill):
    """Drawn anew for every image: half the time it is blurred, else one random colour with noise; what stays visible gets
    a little noise too, so that no edge gives the mask away (Dabkowski & Gal 2017, released code).

    ``spread``, ``noise`` and ``visible`` are stated for pixels in [-1, 1]; the data's ``std`` on the scale of 0 to 1
    brings them to normalised space.
    """

    def __init__(
        self,
        *,
        std: Sequence[float],
        sigma: float = 11.0,
        spread: float = 0.33,
        noise: float = 0.11,
        visible: float = 0.03,
    ) -> None:
        self.blur = Blur(sigma=sigma)
        self.spread, self.noise, self.visible = spread, noise, visible
        self.scale = [0.5 / s for s in std]

    def content(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        options = {"generator": generator, "device": x.device, "dtype": x.dtype}
        colour = (2 * torch.rand((len(x), x.shape[1], 1, 1), **options) - 1) * self.spread  # (N, C, 1, 1)
        flat = (colour + self.noise * torch.randn(x.shape, **options)) * self._scale(x)
        blurred = torch.rand((len(x), 1, 1, 1), **options) < 0.5
        return torch.where(blurred, self.blur.content(x, keep), flat)

    def apply(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            content = self.content(x, keep, generator)
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return (x + self.visible * self._scale(x) * noise) * keep + content * (1 - keep)

    def _scale(self, x: Tensor) -> Tensor:
        return x.new_tensor(self.scale)[:, None, None]  # (C, 1, 1)


class User(Fill):
    """An in-painter of the user: ``function(x, keep) -> images`` like x, in normalised space."""

    def __init__(self, *, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    @classmethod
    def load(
        cls, *, path: str | Path | None = None, function: str | Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> User:
        """From a TorchScript file, or from a function, also by its name ``package.module:function``.

        Either is a program: it runs with this process's rights, so load only what you would run.  A TorchScript file is
        not a pickle; pickled modules are refused.
        """
        if (path is None) == (function is None):
            raise UsageError(
                "fill user: give fill_options.path=FILE (TorchScript) or fill_options.function=MODULE:NAME"
            )
        if function is not None:
            return cls(function=_imported(function) if isinstance(function, str) else function)
        try:
            return cls(function=torch.jit.load(str(path), map_location="cpu").eval())
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UsageError(f"fill file {path} is not TorchScript ({reason}); write it with torch.jit.save") from error

    def content(self, x: Tensor, keep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if isinstance(self.function, torch.nn.Module):
            self.function.to(x.device)
        filled = self.function(x, keep)
        if filled.shape != x.shape:
            raise ValueError(f"the user's fill gave images of shape {tuple(filled.shape)}, expected {tuple(x.shape)}")
        return filled


def _imported(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"fill user: no function {name} ({error}); give MODULE:NAME of one on the Python path"
        ) from error
    if not callable(found):
        raise UsageError(f"fill user: {name} is no function; give one that takes (x, keep) and returns images like x")
    return cast("Callable[[Tensor, Tensor], Tensor]", found)


def black(*, mean: Sequence[float], std: Sequence[float]) -> Colour:
    """Black before normalisation."""
    return Colour(rgb=(0.0,) * len(mean), mean=mean, std=std)


FILLS: dict[str, Callable[..., Fill]] = {
    "zero": Zero,
    "colour": Colour,
    "black": black,
    "blur": Blur,
    "pyramid": BlurPyramid,
    "local-mean": LocalMean,
    "noise": Noise,
    "others": Others,
    "random": RandomMixture,
    "user": User.load,
}
"""Name of the option -> constructor with keyword arguments."""


def make_fill(name: str, options: Mapping[str, Any], *, mean: Sequence[float], std: Sequence[float]) -> Fill:
    """The fill ``name`` with ``options``; those that are stated in pixels learn the data's ``mean`` and ``std``.

    Raises:
        UsageError: no such fill, or options that it does not take.
    """
    if name not in FILLS:
        raise UsageError(f"fill {name!r}: use {', '.join(FILLS)}")
    given = {"mean": mean, "std": std} if name in ("colour", "black") else {"std": std} if name == "random" else {}
    try:
        return FILLS[name](**given, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"fill {name} with {dict(options)}: {error}; see pipeline/fills.py for what it takes"
        ) from error

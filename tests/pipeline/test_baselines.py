"""Blind baselines, and class activation maps of several kinds of classifier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.backbone import Backbone, choose_taps, create_classifier, pyramid, tap_classifier
from pipeline.baselines import ClassActivation, box_maps, center_box, gaussian_maps, whole_box


def test_the_centre_box_is_the_published_one_at_any_size() -> None:
    assert center_box(224) == (33, 33, 191, 191)
    assert center_box(64) == (9, 9, 55, 55)
    maps = box_maps(center_box(64), 3, 64)
    assert maps.masks.shape == (3, 64, 64) and maps.masks[0].sum() == 46 * 46 and maps.boxes == [(9, 9, 55, 55)] * 3


def test_the_gaussian_is_spread_evenly_and_centred() -> None:
    maps = gaussian_maps(2, 32)
    mask = maps.masks[0]
    assert mask.min() >= 0 and mask.max() <= 1 and mask.mean() == pytest.approx(0.5, abs=1e-6)
    np.testing.assert_array_equal(mask, mask[::-1, ::-1])
    x0, y0, x1, y1 = maps.boxes[0] or (0, 0, 0, 0)
    assert x0 == y0 == 32 - x1 == 32 - y1 and whole_box(32) != maps.boxes[0]


def tapped(source: str, name: str, size: int, **arguments: object) -> tuple[Backbone, torch.nn.Module]:
    torch.manual_seed(0)
    classifier = create_classifier(source, name, outputs=7, arguments=arguments).eval()
    taps = choose_taps(pyramid(source, classifier, size), None)
    return tap_classifier(source, classifier, taps, last_map=None).eval(), classifier


def normalised(maps: torch.Tensor, size: int) -> np.ndarray:
    stretched = F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    low, high = stretched.amin((1, 2), keepdim=True), stretched.amax((1, 2), keepdim=True)
    return ((stretched - low) / (high - low)).numpy()


def test_it_is_cam_where_pooling_and_one_layer_end_a_resnet() -> None:
    backbone, classifier = tapped("torchvision", "resnet18", 64)
    x = torch.randn(3, 3, 64, 64)
    found: list[torch.Tensor] = []
    handle = classifier.layer4.register_forward_hook(lambda _m, _i, output: found.append(output))
    with torch.no_grad():
        logits = classifier(x)
    handle.remove()
    weights = classifier.fc.weight.detach()
    for labels in (None, torch.tensor([1, 2, 3])):
        chosen = logits.argmax(1) if labels is None else labels
        expected = torch.einsum("nc,nchw->nhw", weights[chosen], found[0])
        np.testing.assert_allclose(ClassActivation(backbone)(x, labels), normalised(expected, 64), atol=1e-4)


def test_it_is_cam_where_timm_has_a_convolution_behind_its_last_stage() -> None:
    backbone, classifier = tapped("timm", "mobilenetv2_050", 64)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = classifier.forward_features(x)  # (2, 1280, 2, 2), behind conv_head
        chosen = classifier(x).argmax(1)
    expected = torch.einsum("nc,nchw->nhw", classifier.get_classifier().weight.detach()[chosen], maps)
    np.testing.assert_allclose(ClassActivation(backbone)(x), normalised(expected, 64), atol=1e-4)


@pytest.mark.parametrize(
    ("source", "name", "size", "arguments"),
    [
        ("torchvision", "vgg11", 64, {}),
        ("torchvision", "googlenet", 64, {"init_weights": False, "aux_logits": False}),
        ("timm", "vit_tiny_patch16_224", 64, {"img_size": 64}),
        ("timm", "swin_tiny_patch4_window7_224", 64, {"img_size": 64, "window_size": 4}),
    ],
)
def test_any_other_classifier_has_a_map_too(source: str, name: str, size: int, arguments: dict[str, object]) -> None:
    backbone, _ = tapped(source, name, size, **arguments)
    x = torch.randn(2, 3, size, size)
    activation = ClassActivation(backbone)
    for _ in range(2):  # the second call uses what the first one found
        maps = activation(x)
        assert maps.shape == (2, size, size) and maps.dtype == np.float32
        assert maps.min() == 0 and maps.max() == pytest.approx(1) and np.ptp(maps[0]) > 0
    assert all(parameter.requires_grad for parameter in backbone.parameters())

"""Reading the feature maps of torchvision and timm classifiers."""

from __future__ import annotations

import pytest
import torch

from pipeline.backbone import (
    choose_taps,
    create_classifier,
    default_layers,
    pyramid,
    tap_classifier,
)
from pipeline.errors import UsageError

CASES = [
    # source, name, size, arguments, default layers and their cells
    ("torchvision", "resnet18", 224, {}, {3: 14, 4: 7}),
    ("torchvision", "resnet18", 96, {}, {2: 12, 3: 6}),
    ("torchvision", "resnet18", 64, {}, {1: 16, 2: 8, 3: 4}),
    ("torchvision", "mobilenet_v2", 224, {}, {3: 14, 4: 7}),
    ("timm", "mobilenetv2_100", 224, {"pad_type": "same"}, {3: 14, 4: 7}),
    ("timm", "convnext_atto", 96, {}, {1: 12, 2: 6}),
    ("timm", "vit_tiny_patch16_224", 96, {"img_size": 96}, {2: 6, 3: 6}),
    ("timm", "swin_tiny_patch4_window7_224", 224, {}, {2: 14, 3: 7}),
]


@pytest.mark.parametrize(("source", "name", "size", "arguments", "expected"), CASES)
def test_taps_follow_the_size_of_the_maps(source, name, size, arguments, expected) -> None:
    torch.manual_seed(0)
    classifier = create_classifier(source, name, outputs=10, arguments=arguments).eval()
    maps = pyramid(source, classifier, size)
    taps = choose_taps(maps, None)
    assert {tap.layer: tap.height for tap in taps} == expected
    backbone = tap_classifier(source, classifier, taps, last_map=maps[-1].module).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        out = backbone(x)
        plain = classifier(x)
    assert torch.allclose(out.logits, plain, atol=1e-5)
    for tap in taps:
        assert out.features[tap.layer].shape == (2, tap.channels, tap.height, tap.width)
    assert backbone.head is not None and backbone.head.out_features == 10
    assert backbone.last_map is not None


def test_token_maps_keep_their_place() -> None:
    classifier = create_classifier("timm", "vit_tiny_patch16_224", outputs=2, arguments={"img_size": 64}).eval()
    maps = pyramid("timm", classifier, 64)
    backbone = tap_classifier("timm", classifier, maps[:1], last_map=None).eval()
    tokens = {}
    classifier.get_submodule(maps[0].module).register_forward_hook(lambda _m, _i, out: tokens.update(all=out))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        classifier(x)
        feature = backbone(x).features[0]
    assert torch.allclose(
        feature[0, :, 1, 2], tokens["all"][0, 1 + 1 * 4 + 2], atol=1e-5
    )  # row 1, column 2; one class token


def test_default_layers_prefer_the_deepest() -> None:
    classifier = create_classifier("torchvision", "resnet18", outputs=10, arguments={})
    assert default_layers(pyramid("torchvision", classifier, 448)) == (4,)
    assert default_layers(pyramid("torchvision", classifier, 128)) == (2, 3, 4)


def test_wrong_names_and_layers_are_one_line() -> None:
    with pytest.raises(UsageError, match="check --init"):
        create_classifier("torchvision", "resnet1", outputs=10, arguments={})
    with pytest.raises(UsageError, match="--init-arg"):
        create_classifier("torchvision", "resnet18", outputs=10, arguments={"colour": 1})
    classifier = create_classifier("torchvision", "resnet18", outputs=10, arguments={})
    with pytest.raises(UsageError, match="--layers 7"):
        choose_taps(pyramid("torchvision", classifier, 64), (7,))

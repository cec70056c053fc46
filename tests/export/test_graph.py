"""The deployable graph in torch: what goes in, what comes out, and every option."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from export.graph import DeployableGraph, GraphConfig
from pipeline.errors import UsageError


def run(bundle, images: np.ndarray, **options):
    graph = DeployableGraph(model=bundle.model, spec=bundle.spec, config=GraphConfig(**options)).eval()
    with torch.no_grad():
        outputs = graph(torch.from_numpy(images))
    return dict(zip(graph.config.output_names, outputs, strict=True))


def test_takes_bytes_and_normalises_inside(bundle):
    found = run(bundle, bundle.samples[:3])
    x = (bundle.samples[:3] / 255 - np.array(bundle.spec.mean)) / np.array(bundle.spec.std)
    with torch.no_grad():
        logits, mask = bundle.model(torch.from_numpy(x.transpose(0, 3, 1, 2)).float())
    torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["mask"], mask[:, 0], rtol=1e-4, atol=1e-4)
    assert found["mask"].shape == (3, 16, 16)
    assert found["mask"].std() > 0.02  # the tests' masks are no constants


def test_byte_masks_and_upsampled_masks(bundle):
    soft = run(bundle, bundle.samples[:2])["mask"]
    found = run(bundle, bundle.samples[:2], mask_dtype="uint8", upsampled=True)
    assert found["mask"].dtype == found["mask_upsampled"].dtype == torch.uint8
    assert torch.equal(found["mask"], torch.round(soft * 255).to(torch.uint8))
    assert torch.equal(found["mask_upsampled"], found["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize("height, width", [(64, 64), (301, 97), (40, 200), (20, 13)])
def test_resize_inside_gives_pillows_pixels(height, width):
    from export.graph import _squash

    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = _squash(torch.from_numpy(image)[None].float(), 64)[0].numpy()
    pillow = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
    assert np.abs(found - pillow).max() <= 1


def test_masks_of_the_first_k_classes(make_bundle):
    conditional = make_bundle(class_conditional=True, samples=2)
    found = run(conditional, conditional.samples, topk=3)
    assert torch.equal(found["topk_labels"], found["logits"].topk(3).indices)
    assert torch.allclose(found["topk_masks"][:, 0], found["mask"], atol=1e-6)  # the first is the predicted class
    assert not torch.allclose(found["topk_masks"][:, 1], found["mask"], atol=1e-3)


def test_the_wanted_area_is_built_in(make_bundle):
    conditioned = make_bundle(target_area=True, samples=2)
    little, much = (run(conditioned, conditioned.samples, target_area=area)["mask"] for area in (0.0, 1.0))
    assert not torch.allclose(little, much, atol=1e-3)


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"topk": 3}, "not class-conditional"),
        ({"target_area": 0.3}, "does not take the wanted area"),
        ({"resize": True, "dynamic_size": True}, "exclude each other"),
        ({"target_area": 1.5}, "between 0 and 1"),
    ],
)
def test_options_that_do_not_fit_say_so(bundle, options, complaint):
    with pytest.raises(UsageError, match=complaint):
        run(bundle, bundle.samples[:1], **options)


def test_the_model_itself_is_left_alone(bundle):
    before = [type(module) for module in bundle.model.modules()]
    DeployableGraph(model=bundle.model, spec=bundle.spec)
    assert [type(module) for module in bundle.model.modules()] == before

"""The rewritten classifier is the plain one: same answers, same gradients, same state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.acceleration import _FoldingConv, accelerate
from pipeline.backbone import Backbone, choose_taps, create_classifier, pyramid, tap_classifier
from pipeline.batchnorm import synchronise
from pipeline.model import SaliencyModel, build_masker
from pipeline.population import Population, PopulationConfig
from pipeline.presets import PRESETS
from pipeline.settings import configure
from pipeline.spec import MaskerSpec
from pipeline.step import Batch
from tests.pipeline.test_step import a_step

NETWORKS = [
    ("torchvision", "resnet18", {}),
    ("torchvision", "mobilenet_v3_small", {}),
    ("timm", "mobilenetv2_100", {"pad_type": "same"}),
    ("timm", "efficientnet_b0", {}),
]
SIZE = 64


def network(source: str, name: str, arguments: dict) -> Backbone:
    torch.manual_seed(0)
    classifier = create_classifier(source, name, outputs=5, arguments=arguments)
    maps = pyramid(source, classifier, SIZE)
    backbone = tap_classifier(source, classifier, choose_taps(maps, None), last_map=maps[-1].module)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics and affine maps that a folding can get wrong
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return backbone.double()


def images() -> torch.Tensor:
    return torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def answer(backbone: Backbone, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and maps, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_(True)
    out = backbone(x)
    values = [out.logits, *out.features.values()]
    total = sum((value.square() * torch.linspace(0.5, 1, value.numel()).view_as(value)).sum() for value in values)
    assert isinstance(total, torch.Tensor)
    gradients = torch.autograd.grad(total, [x, *backbone.parameters()], allow_unused=True)
    return torch.cat([value.flatten() for value in values]), [g for g in gradients if g is not None]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("source", "name", "arguments"), NETWORKS)
def test_answers_and_gradients_are_those_of_the_plain_network(source, name, arguments, mode) -> None:
    plain = network(source, name, arguments)
    fast = accelerate(copy.deepcopy(plain))
    assert isinstance(fast, Backbone)
    assert sum(isinstance(module, _FoldingConv) for module in fast.modules()) >= 10
    for backbone in (plain, fast):
        backbone.train(mode == "train")
        for module in backbone.modules():
            if isinstance(module, torch.nn.Dropout) or type(module).__name__ == "DropPath":
                module.eval()
    torch.manual_seed(2)
    expected, expected_gradients = answer(plain, images())
    torch.manual_seed(2)
    found, gradients = answer(fast, images())
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert len(gradients) == len(expected_gradients)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-8, atol=1e-9 * max(1.0, wanted.abs().max().item()))
    for key, value in plain.state_dict().items():
        assert torch.allclose(fast.state_dict()[key].double(), value.double(), rtol=1e-9, atol=1e-12), key
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_a_copy_folds_its_own_statistics() -> None:
    """The population judges with copies: their convolutions must not look at the original's BatchNorm."""
    fast = accelerate(network("torchvision", "resnet18", {})).eval()
    twin = copy.deepcopy(fast).eval()
    before = twin(images()).logits
    with torch.no_grad():
        for module in fast.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean.add_(1.0)
    assert torch.equal(twin(images()).logits, before)
    assert not torch.allclose(fast(images()).logits, before)


def test_twice_is_once_and_synchronised_norms_fold_too() -> None:
    backbone = network("timm", "mobilenetv2_100", {"pad_type": "same"})
    expected = backbone.eval()(images()).logits
    synchronise(backbone)
    again = accelerate(accelerate(backbone))
    assert torch.allclose(again(images()).logits, expected, rtol=1e-9, atol=1e-9)


def test_strided_depthwise_convolutions_in_bfloat16() -> None:
    """The detour gives the cells of the strided convolution, and their gradients."""
    plain = network("timm", "mobilenetv2_100", {"pad_type": "same"}).float().eval()
    fast = accelerate(copy.deepcopy(plain)).eval()  # a copy of a traced network begins in train mode
    x = images().float()
    exact, exact_gradients = answer(plain, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_gradients = answer(plain, x)
        found, gradients = answer(fast, x)

    def error(values: torch.Tensor, truth: torch.Tensor) -> float:
        return ((values.float() - truth).norm() / truth.norm()).item()

    assert error(found, exact) < 1.5 * error(expected, exact) < 0.1
    assert error(gradients[0], exact_gradients[0]) < 1.5 * error(expected_gradients[0], exact_gradients[0])


@pytest.mark.parametrize(
    ("source", "preset", "words", "drawn"),
    [
        ("timm", "fix", [], None),
        ("timm", "ca", [], None),
        ("torchvision", "ca", [], 0),
        ("torchvision", "ca", ["compat=published", "relative_units=false"], None),
        (
            "torchvision",
            "ca",
            ["mask_out.objective=classification", "mask_out.direction=minimize", "weight_out=0.3"],
            None,
        ),
        ("torchvision", "dabkowski-gal", ["fakes=0.5", "classifier=joint"], None),
    ],
)
def test_the_fast_step_has_the_gradients_of_the_plain_one(
    source: str, preset: str, words: list[str], drawn: int | None
) -> None:
    """All of a joint step, MobileNet's folded and depthwise layers included: losses and every gradient, in float64."""
    method = configure(preset, words)
    backbone = network(*(NETWORKS[2] if source == "timm" else NETWORKS[0]))
    spec = MaskerSpec(class_conditional=True) if preset == "dabkowski-gal" else MaskerSpec()
    masker = build_masker(spec, backbone, mask_size=SIZE // 4, classes=5)
    model = SaliencyModel(backbone=backbone, masker=masker).double()
    joint = method.classifier == "joint"
    found = []
    for plain in (True, False):
        population = Population(config=PopulationConfig(own_clean=True), seed=0)
        blank = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64)
        step = a_step(copy.deepcopy(model), method, population, blank=blank, plain=plain)
        population.observe(0, model.backbone)
        batch = Batch(images(), torch.tensor([0, 3, 1]))
        drawing = torch.Generator().manual_seed(0)
        losses = step.losses(batch, divisor=3, phase="joint", drawn=drawn, generator=drawing)
        assert losses.masker is not None and (losses.classifier is not None) == joint
        masker_gradients, classifier_gradients = step.gradients(losses)
        assert len(masker_gradients) > 5 and bool(classifier_gradients) == joint
        logs = [value for _, value in sorted(losses.logs.items())]
        found.append([*logs, losses.masker.detach(), *masker_gradients, *classifier_gradients])
    for wanted, mine in zip(*found, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-9, atol=1e-9 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("method", ["adam", "sgd"])
def test_fast_steps_lead_to_the_weights_of_plain_ones(method: str) -> None:
    """In the memory format of a training, in which gradients come in another than their weights have."""
    backbone = network(*NETWORKS[0])
    model = SaliencyModel(
        backbone=backbone, masker=build_masker(MaskerSpec(), backbone, mask_size=16, classes=5)
    ).double()
    preset = configure("ca", [f"optimisation.classifier_method={method}"])
    states = []
    for plain in (True, False):
        blank = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64)
        like_training = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        step = a_step(like_training, preset, blank=blank, plain=plain)
        for number in range(3):
            x = images().to(memory_format=torch.channels_last)
            step(Batch(x, torch.tensor([0, 3, 1])), step=number, divisor=3, phase="joint", course=0.5)
        states.append(step.model.state_dict())
    for name, wanted in states[0].items():
        assert torch.allclose(states[1][name], wanted, rtol=1e-8, atol=1e-9), name
    assert any(
        not torch.equal(states[0][name], value) for name, value in model.state_dict().items() if "backbone" in name
    )


@pytest.mark.parametrize(("plain", "passes"), [(True, 11), (False, 10)])
def test_work_of_a_joint_step(plain: bool, passes: int) -> None:
    """In forward passes of the classifier: three, and the backward passes that somebody needs.

    Clean: the weights' gradients and the way to them, but not to the picture (2).  Masked-in: the way to the mask and the
    weights' gradients (2, or 3 in two passes).  Masked-out: the mask's (1) and the weights' (2), of different objectives.
    """
    backbone = network("torchvision", "resnet18", {}).float()
    model = SaliencyModel(backbone=backbone, masker=build_masker(MaskerSpec(), backbone, mask_size=16, classes=5))
    x = images().float()

    def operations(work: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return sum(
            n for module, calls in counter.get_flop_counts().items() if module == "Global" for n in calls.values()
        )

    forward = operations(lambda: model.backbone(x))
    masker = operations(lambda: model(x)) - forward
    step = a_step(model, replace(PRESETS["ca"], weight_blank=0.0), blank=torch.zeros(1, 3, SIZE, SIZE), plain=plain)
    batch = Batch(x, torch.tensor([0, 3, 1]))
    whole = operations(lambda: step.gradients(step.losses(batch, divisor=3, phase="joint", drawn=None)))
    assert (whole - 3 * masker) / forward == pytest.approx(passes, abs=0.5)

"""Checkpoints of the published layout become bundles; hostile and strange ones are refused with one line."""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

from pipeline.bundle import load_bundle
from pipeline.concrete import ConcreteConfig
from pipeline.errors import UsageError
from pipeline.import_published import main, read_checkpoint
from pipeline.masker import Masker
from pipeline.masking import upsample
from pipeline.published import CHANNELS, published_masker
from tests.golden_checks._golden import GoldenFile, assert_close, load_golden
from tests.golden_checks._inputs import seeded_weights
from tests.golden_checks.masker import build as masker_of
from tests.golden_checks.masker import features

GOLDEN = Path(__file__).parent.parent / "golden"

ONE = torch.ones(1)
CA = {"masker_use_layers": "3,4", "prob_historic": 0.5, "fixed_classifier": False, "train_json": "train.json"}


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(0)
    return resnet50(weights=None).eval()


def random_masker(layers: tuple[int, ...], **options: Any) -> Masker:
    torch.manual_seed(1)
    return Masker(taps={layer: CHANNELS[layer] for layer in layers}, mask_size=(56, 56), **options).eval()


def checkpoint(classifier: nn.Module, masker: Masker, args: Any, *, key: str = "state_dict_masker") -> dict[str, Any]:
    return {
        "epoch": 60,
        "state_dict_classifier": classifier.state_dict(),
        key: masker.state_dict(),
        "optimizer_classifier": torch.optim.SGD(classifier.parameters(), lr=1e-3).state_dict(),
        "optimizer_masker": torch.optim.Adam(masker.parameters()).state_dict(),
        "args": args,
    }


def expected(classifier: nn.Module, masker: Masker, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and native masks from the parts, without any backbone code of the product."""
    with torch.no_grad():
        return classifier(x), masker.masks(masker(maps_of(classifier, x)))


def maps_of(classifier: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """The five maps of a torchvision ResNet."""
    maps: dict[int, Tensor] = {}
    stages = ("maxpool", "layer1", "layer2", "layer3", "layer4")
    hooks = [
        classifier.get_submodule(name).register_forward_hook(lambda _m, _i, o, layer=layer: maps.update({layer: o}))
        for layer, name in enumerate(stages)
    ]
    with torch.no_grad():
        classifier(x)
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_a_ca_checkpoint_becomes_a_bundle_with_the_same_outputs(classifier, tmp_path: Path, zipped: bool) -> None:
    masker = random_masker((3, 4))
    torch.save(checkpoint(classifier, masker, CA), tmp_path / "ca.chk", _use_new_zipfile_serialization=zipped)
    main([str(tmp_path / "ca.chk"), "--out", str(tmp_path / "bundle")])
    bundle = load_bundle(tmp_path / "bundle")
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    logits, masks = bundle.model(x)
    want_logits, want_masks = expected(classifier, masker, x)
    torch.testing.assert_close(logits, want_logits)
    torch.testing.assert_close(masks, want_masks)
    assert masks.shape == (2, 1, 56, 56)
    spec = bundle.spec
    assert (spec.preset, spec.geometry, spec.input_size, spec.mask_size) == ("published", "crop", 224, 56)
    assert (spec.class_names[0], spec.data_classes[0]) == ("tench", "n01440764")
    assert spec.backbone.batchnorm == "train"
    assert spec.training["epochs"] == 60 and "train_json" not in spec.training["options"]


def test_a_predecessor_file_with_a_namespace_and_all_layers(classifier, tmp_path: Path) -> None:
    masker = random_masker((0, 1, 2, 3, 4))
    args = argparse.Namespace(adversarial=True, lambda_r=10.0, fixed_classifier=True)
    content = checkpoint(classifier, masker, args, key="state_dict_decoder")
    for name in [name for name in content["state_dict_decoder"] if name.endswith("num_batches_tracked")]:
        del content["state_dict_decoder"][name]  # files of PyTorch 0.4 have none
    torch.save(content, tmp_path / "casm.chk")
    main([str(tmp_path / "casm.chk"), "--out", str(tmp_path / "bundle")])
    bundle = load_bundle(tmp_path / "bundle")
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(bundle.model(x)[1], expected(classifier, masker, x)[1])
    assert bundle.spec.training["ignored_options"] == ["adversarial"]
    assert bundle.spec.backbone.batchnorm == "eval"


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], GoldenFile]:
    """The recorded layout of checkpoints, and the recorded masks."""
    layout = json.loads((GOLDEN / "checkpoint_layout.json").read_text())
    masks = load_golden(GOLDEN / "masker_a.npz")
    assert isinstance(masks, GoldenFile)
    return layout, masks


@pytest.mark.parametrize("name", ["fix", "ca", "predecessor"])
def test_a_file_of_the_recorded_layout_gives_the_recorded_masks(classifier, golden, tmp_path: Path, name: str) -> None:
    layout, recorded = golden
    layers = [0, 1, 2, 3, 4] if name == "predecessor" else [3, 4]
    plain = {"add_prob_layers", "add_class_ids", "apply_gumbel"}
    cases = recorded.json("cases_json")
    place, case = next(
        (i, case)
        for i, case in enumerate(cases)
        if case["use_layers"] == layers and not case["train"] and not any(case.get(key) for key in plain)
    )
    upsampling = case.get("final_upsample_mode", "nearest")
    source = masker_of(case)
    seeded_weights(source, case["weight_seed"])
    variant = next(
        r
        for r in layout["state_dict_masker"]
        if r["variant"].startswith(f"use_layers {str(layers)[1:-1]}".replace(", ", ","))
    )
    tensors = laid_out(source.state_dict(), variant["tensors"])
    content = dict.fromkeys(layout["top_level_keys"])
    content |= {
        "epoch": 60,
        "state_dict_classifier": laid_out(classifier.state_dict(), layout["state_dict_classifier"]["tensors"]),
        "optimizer_classifier": torch.optim.SGD(classifier.parameters(), lr=1e-3).state_dict(),
        "optimizer_masker": torch.optim.Adam(source.parameters()).state_dict(),
        "state_dict_masker": tensors,
    }
    if name == "predecessor":
        content["state_dict_decoder"] = content.pop("state_dict_masker")
        content["args"] = argparse.Namespace(lambda_r=10.0, upsample=upsampling, fixed_classifier=False)
    else:
        options = layout["args"][f"final_{name.upper()}"] | layout["args"]["command_line_extra"]
        content["args"] = options | {"upsample": upsampling}
    torch.save(content, tmp_path / "published.chk")
    main([str(tmp_path / "published.chk"), "--out", str(tmp_path / "bundle")])
    bundle = load_bundle(tmp_path / "bundle")

    masks = bundle.model.masker.masks(bundle.model.masker(features(case)))
    if upsampling == "bilinear":
        masks = upsample(masks, (224, 224), "bilinear")[:1]
    else:
        masks = upsample(masks, (224, 224), "nearest")[..., ::4, ::4]
    assert_close(masks, recorded[f"mask_{place}"], 2e-5, "masks of the recorded maps")

    # In float64: in float32 two orders of the same sums differ by more than 2e-5 on some processors.
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2)).double()
    maps = maps_of(copy.deepcopy(classifier).double(), x)
    source_tensors = {key: value.double() for key, value in tensors.items()}
    expected = plain_masks(source_tensors, {layer: maps[layer] for layer in layers})
    torch.testing.assert_close(bundle.model.double()(x)[1], expected, atol=1e-9, rtol=0)
    assert bundle.spec.backbone.batchnorm == ("eval" if name == "fix" else "train")


def laid_out(state: Mapping[str, Tensor], tensors: list[dict[str, Any]]) -> OrderedDict[str, Tensor]:
    """``state`` as a file of the recorded layout has it: these names in this order, of these shapes and types."""
    result = OrderedDict((record["key"], state[record["key"]].clone()) for record in tensors)
    for record in tensors:
        value = result[record["key"]]
        assert [list(value.shape), str(value.dtype)] == [record["shape"], f"torch.{record['dtype']}"], record
    assert len(result) == len(state)
    return result


def plain_masks(tensors: Mapping[str, Tensor], maps: Mapping[int, Tensor]) -> Tensor:
    """Masks from a checkpoint's tensors alone, as the paper writes the masker."""
    stack = []
    for layer, value in maps.items():
        name = f"conv1x1_{layer}"
        if f"{name}.0.weight" in tensors:
            weight, bias, mean, var = (
                tensors[f"{name}.1.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
            )
            value = F.conv2d(value, tensors[f"{name}.0.weight"])
            value = F.batch_norm(value, mean, var, weight, bias).relu()
        stack.append(F.interpolate(value, size=(56, 56), mode="bilinear", align_corners=False))
    return F.conv2d(torch.cat(stack, 1), tensors["final.0.weight"], tensors["final.0.bias"], padding=1).sigmoid()


def test_options_that_change_the_network_are_obeyed(classifier, tmp_path: Path) -> None:
    masker = random_masker((4,), concrete=ConcreteConfig(), target_area=True, class_count=1000)
    args = {
        "masker_use_layers": "4",
        "upsample": "bilinear",
        "add_prob_layers": True,
        "add_class_ids": True,
        "apply_gumbel": True,
        "apply_gumbel_tau": None,
        "gumbel_output_mode": "sigmoid",
    }
    torch.save(checkpoint(classifier, masker, args), tmp_path / "x.chk")
    main([str(tmp_path / "x.chk"), "--out", str(tmp_path / "bundle")])
    spec = load_bundle(tmp_path / "bundle").spec
    assert spec.masker.upsampling == "bilinear" and spec.masker.target_area and spec.masker.class_conditional
    assert spec.masker.concrete == {"mode": "sigmoid", "temperature": 0.1, "shown": "mode"}


def test_a_classifier_from_elsewhere(classifier, tmp_path: Path) -> None:
    content = checkpoint(classifier, random_masker((3, 4)), CA)
    del content["state_dict_classifier"]
    torch.save(content, tmp_path / "m.chk")
    with pytest.raises(UsageError, match="--classifier FILE"):
        main([str(tmp_path / "m.chk"), "--out", str(tmp_path / "bundle")])
    with pytest.raises(UsageError, match=r"--classifier .*no such file"):
        main([str(tmp_path / "m.chk"), "--out", str(tmp_path / "bundle"), "--classifier", str(tmp_path / "none.pt")])
    bait = tmp_path / "owned"
    torch.save(Hostile(Path.touch, bait), tmp_path / "evil.pt")
    with pytest.raises(UsageError, match=r"evil\.pt"):
        main([str(tmp_path / "m.chk"), "--out", str(tmp_path / "bundle"), "--classifier", str(tmp_path / "evil.pt")])
    assert not bait.exists()
    torch.save(classifier.state_dict(), tmp_path / "resnet50.pt")
    main([str(tmp_path / "m.chk"), "--out", str(tmp_path / "bundle"), "--classifier", str(tmp_path / "resnet50.pt")])
    bundle = load_bundle(tmp_path / "bundle")
    state = bundle.model.backbone.state_dict()
    torch.testing.assert_close(state["extractor.fc.weight"], classifier.state_dict()["fc.weight"])
    assert bundle.spec.training["classifier"] == "resnet50.pt"
    assert "state_dict_classifier" not in bundle.spec.training["left_out"]
    torch.save(Counterfeit(classifier.state_dict()), tmp_path / "counterfeit.pt")
    with pytest.raises(UsageError, match=r"--classifier .*counterfeit\.pt: holds no state dict"):
        main([str(tmp_path / "m.chk"), "--out", str(tmp_path / "b"), "--classifier", str(tmp_path / "counterfeit.pt")])


def test_what_is_left_out_is_said(classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = {**CA, "casms_path": "/home/me/casms", "output_path": "/home/me/out"}
    content = checkpoint(classifier, random_masker((3, 4)), args)
    content["state_dict_masker"] = Counterfeit(content["state_dict_masker"])
    torch.save(content, tmp_path / "x.chk")
    main([str(tmp_path / "x.chk"), "--out", str(tmp_path / "own")])
    paths = ["option train_json", "option casms_path", "option output_path"]
    optimisers = ["optimizer_classifier", "optimizer_masker"]
    training = load_bundle(tmp_path / "own").spec.training
    assert training["left_out"] == [*optimisers, *paths] and training["classifier"] == "the checkpoint's own"
    assert f"left out: {', '.join([*optimisers, *paths])}" in capsys.readouterr().out.splitlines()
    torch.save(classifier.state_dict(), tmp_path / "resnet50.pt")
    main([str(tmp_path / "x.chk"), "--out", str(tmp_path / "b"), "--classifier", str(tmp_path / "resnet50.pt")])
    assert load_bundle(tmp_path / "b").spec.training["left_out"] == [*optimisers, "state_dict_classifier", *paths]


def test_a_temperature_of_minus_one_is_learned_only_where_there_is_one() -> None:
    """The release takes -1 for a number, so that its files have no temperature of their own; trained hard masks need none."""
    options = {"apply_gumbel": True, "apply_gumbel_tau": -1}
    assert published_masker(options).concrete == {"mode": "hard", "temperature": 0.1, "shown": "mode"}
    learned = published_masker(options, tensors={"final.tau"}).concrete
    assert learned == {"mode": "hard", "temperature": None, "shown": "mode"}


class Hostile:
    """A pickle that creates a file when it is loaded carelessly."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("where", ["args", "top"])
@pytest.mark.parametrize("call", [os.system, exec, subprocess.check_call, Path.touch], ids=lambda c: c.__name__)
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path: Path, call: Any, where: str, zipped: bool) -> None:
    bait = tmp_path / "owned"
    argument: Any = {
        os.system: f"touch {bait}",
        exec: f"open({str(bait)!r}, 'w')",
        subprocess.check_call: ["touch", str(bait)],
        Path.touch: bait,
    }[call]
    hostile = Hostile(call, argument)
    content = {"epoch": 1, "state_dict_masker": {}, "args": hostile} if where == "args" else hostile
    torch.save(content, tmp_path / "evil.chk", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match="refused: it asks for"):
        read_checkpoint(tmp_path / "evil.chk")
    assert not bait.exists()
    torch.load(tmp_path / "evil.chk", weights_only=False)  # the bait is real
    assert bait.exists()


def test_the_command_refuses_with_status_2_and_one_line(tmp_path: Path) -> None:
    torch.save(Hostile(os.system, f"touch {tmp_path / 'owned'}"), tmp_path / "evil.chk")
    command = [sys.executable, "-m", "pipeline.import_published", tmp_path / "evil.chk", "--out", tmp_path / "bundle"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "evil.chk is refused" in done.stderr
    assert not (tmp_path / "owned").exists() and not (tmp_path / "bundle").exists()


class Counterfeit(OrderedDict[str, Any]):
    """In a file an OrderedDict whose methods and metadata are overwritten with numbers."""

    def __reduce__(self) -> Any:
        overwritten = dict.fromkeys(("items", "keys", "values", "copy", "_metadata"), 3)
        return OrderedDict, (), overwritten, None, iter(dict.items(self))


def small(**more: Any) -> dict[str, Any]:
    return {"epoch": 1, "state_dict_masker": OrderedDict(), "args": {}, **more}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (small(state_dict_generator={}, zoo=1), "unknown keys state_dict_generator, zoo"),
        ({"epoch": 1, "args": {}}, "holds no masker"),
        (small(), "holds no ResNet-50 classifier"),
        ([1, 2], "holds a list"),
        (small(args=5), "its args are a int"),
        (small(args={1: 2}), "its args are a dict and not options by name"),
        (small(args={"lr": torch.tensor(0.1)}), r"option lr is tensor"),
        (small(args={"lr": float("nan")}), "option lr is nan"),
        (small(epoch=torch.tensor(3)), "epoch is a Tensor"),
        (small(state_dict_classifier={"fc.weight": 3}), "fc.weight is no matrix"),
        (small(state_dict_classifier={"fc.weight": torch.zeros(0, 2048)}), "fc.weight is no matrix"),
        (small(state_dict_classifier={"fc.weight": torch.zeros(1).expand(10**9, 2048)}), "fc.weight is no matrix"),
        (small(state_dict_classifier={"fc.weight": torch.zeros(100_001, 1)}), "100001 classes, and at most 100000"),
        (small(state_dict_masker=Counterfeit({"a": torch.zeros(1)})), "holds no ResNet-50 classifier"),
        (small(state_dict_classifier=Counterfeit({"fc.weight": torch.zeros(2, 1)})), "lacks: conv1.weight"),
        (small(args=Counterfeit({"lr": 0.1})), "holds no ResNet-50 classifier"),
        (Counterfeit(small()), "holds no ResNet-50 classifier"),
    ],
)
def test_strange_checkpoints_are_named(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.chk")
    with pytest.raises(UsageError, match=message):
        main([str(tmp_path / "x.chk"), "--out", str(tmp_path / "bundle")])


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_checkpoint(tmp_path / "none.chk")
    for content in (b"", b"not a pickle", b"PK\x03\x04 damaged"):
        (tmp_path / "x.chk").write_bytes(content)
        with pytest.raises(UsageError, match="not a readable PyTorch checkpoint"):
            read_checkpoint(tmp_path / "x.chk")


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        (lambda s: s.update({"final.9.weight": torch.zeros(1)}), CA, "has unknown tensors: final.9.weight"),
        (lambda s: s.pop("final.0.bias"), CA, "lacks: final.0.bias"),
        (lambda s: s.update({"final.0.bias": torch.tensor([torch.nan])}), CA, "no finite numbers: final.0.bias"),
        (lambda s: s.update({"final.0.bias": torch.zeros(1).to_sparse()}), CA, "no finite numbers: final.0.bias"),
        (lambda s: s.update({"final.0.bias": torch.zeros(1, device="meta")}), CA, "no finite numbers: final.0.bias"),
        (lambda s: s.update({"final.0.bias": torch.zeros(1).to(torch.complex64)}), CA, "no finite numbers: final.0.b"),
        (lambda s: s.update({"final.0.bias": torch.zeros(2)}), CA, r"has other shapes: final.0.bias \(2,\)"),
        (lambda s: s.update({"final.0.weight": ONE.expand(1, 128, 3, 3)}), CA, "no finite numbers: final.0.weight"),
        (
            lambda s: s.update({"final.0.bias": torch.zeros(1).to(torch.float8_e5m2)}),
            CA,
            "no finite numbers: final.0.b",
        ),
        (lambda s: s.update({"final.0.bias": ONE.expand(10**12)}), CA, "has other shapes: final.0.bias"),
        (lambda s: s.update({"final.9": ONE.expand(10**12)}), CA, "has unknown tensors: final.9"),
        (
            lambda s: None,
            {**CA, "apply_gumbel": True, "apply_gumbel_tau": -1, "gumbel_output_mode": "soft"},
            "apply_gumbel_tau -1 without a learned temperature",
        ),
        (lambda s: None, {"masker_use_layers": "3,9"}, "names no layers of ResNet-50"),
        (lambda s: None, {**CA, "upsample": "cubic"}, "upsample 'cubic' is not known"),
        (
            lambda s: None,
            {**CA, "apply_gumbel": True, "apply_gumbel_tau": "warm"},
            "apply_gumbel_tau 'warm' is no temper",
        ),
        (lambda s: None, {**CA, "apply_gumbel": True, "apply_gumbel_tau": 0}, "apply_gumbel_tau 0 is no temperature"),
        (lambda s: None, {}, "lacks: conv1x1_1.0.weight"),
    ],
)
def test_a_masker_that_does_not_fit(classifier, tmp_path: Path, change: Any, args: Any, message: str) -> None:
    content = checkpoint(classifier, random_masker((3, 4)), args)
    change(content["state_dict_masker"])
    torch.save(content, tmp_path / "x.chk")
    with pytest.raises(UsageError, match=message):
        main([str(tmp_path / "x.chk"), "--out", str(tmp_path / "bundle")])

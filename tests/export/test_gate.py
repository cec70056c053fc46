"""The parity gate: five saboteurs, five failures; and what it says of engines that are alright."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export import parity as command
from export.engine import open_engine
from export.figures import Answers, displacement, mask_iou, rank_correlation
from export.gate import BatchError, LocalisationError, LogitsError, MaskError, MaskShapeError, Thresholds, check, judge
from export.gate_images import from_folder, from_noise, from_samples
from export.graph import GraphConfig
from export.onnx import export_onnx
from export.torch_engine import TorchEngine
from pipeline.data.planted import write_planted
from pipeline.errors import UsageError


def initialiser(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def scale_layer(model: onnx.ModelProto, part: str) -> None:
    convolution = next(node for node in model.graph.node if node.op_type == "Conv" and part in node.input[1])
    tensor = initialiser(model, convolution.input[1])
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.05), tensor.name))


def last_weights(model: onnx.ModelProto) -> str:
    return [node for node in model.graph.node if node.op_type == "Conv"][-1].input[1]


def rewire(model: onnx.ModelProto, name: str, *nodes: onnx.NodeProto, **constants: np.ndarray) -> None:
    """Put ``nodes`` behind the value ``name``; they read `before` and give ``name``."""
    for node in model.graph.node:
        node.output[:] = ["before" if output == name else output for output in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
    kept = list(model.graph.node)
    place = next(k for k, node in enumerate(kept) if "before" in node.output) + 1
    del model.graph.node[:]
    model.graph.node.extend([*kept[:place], *nodes, *kept[place:]])


def wrong_mean(model: onnx.ModelProto) -> None:
    tensor = next(
        t for t in model.graph.initializer if list(t.dims) == [1, 3, 1, 1] and numpy_helper.to_array(t).max() < 0
    )
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.1), tensor.name))


def swapped_channels(model: onnx.ModelProto) -> None:
    cast = model.graph.node[0].output[0]
    rewire(model, cast, helper.make_node("Gather", ["before", "order"], [cast], axis=3), order=np.array([2, 1, 0]))


def shifted_mask(model: onnx.ModelProto) -> None:
    shifted = np.maximum(np.arange(16) - 1, 0)
    rewire(model, "mask", helper.make_node("Gather", ["before", "columns"], ["mask"], axis=2), columns=shifted)


def row_dependent(model: onnx.ModelProto) -> None:
    rewire(
        model,
        "mask",
        helper.make_node("Shape", ["before"], ["rows"], start=0, end=1),
        helper.make_node("ConstantOfShape", ["rows"], ["ones"], value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("CumSum", ["ones", "axis"], ["place"]),
        helper.make_node("Mul", ["place", "little"], ["offset"]),
        helper.make_node("Reshape", ["offset", "column"], ["offsets"]),
        helper.make_node("Sub", ["before", "offsets"], ["mask"]),
        axis=np.array(0),
        little=np.array(0.0005, np.float32),
        column=np.array([-1, 1, 1]),
    )


SABOTEURS = {
    "a layer of the classifier scaled by 1.05": (lambda model: scale_layer(model, "layer2.0.conv1"), LogitsError),
    "a layer of the masker scaled by 1.05": (lambda model: scale_layer(model, last_weights(model)), MaskError),
    "a wrong mean": (wrong_mean, LogitsError),
    "swapped channels": (swapped_channels, LogitsError),
    "the mask shifted by one cell": (shifted_mask, MaskShapeError),
    "an error that depends on the row": (row_dependent, BatchError),
}


@pytest.mark.parametrize("name", SABOTEURS)
def test_saboteurs_are_caught(exported, bundle, tmp_path, name):
    sabotage, kind = SABOTEURS[name]
    model = onnx.load(exported.path)
    sabotage(model)
    onnx.save(model, tmp_path / "model.onnx")
    engine, reference = open_engine(tmp_path / "model.onnx", threads=1), TorchEngine(bundle.path, bundle=bundle)
    verdict = judge(reference, engine, from_samples(bundle.samples, 12), thresholds=Thresholds())
    assert not verdict.passed
    assert any(isinstance(error, kind) for error in verdict.errors), verdict.errors


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_a_shifted_mask_is_caught_at_any_precision(exported, bundle, tmp_path, precision):
    """Where the limits of values are wide, a shift is still no rounding."""
    model = onnx.load(exported.path)
    shifted_mask(model)
    onnx.save(model, tmp_path / "model.onnx")
    reference, images = TorchEngine(bundle.path, bundle=bundle), from_samples(bundle.samples, 12)
    limits = Thresholds.of(precision)
    verdict = judge(reference, open_engine(tmp_path / "model.onnx", threads=1), images, thresholds=limits)
    assert verdict.figures["mask_shift"] == 1 and any(error.figure == "mask_shift" for error in verdict.errors)
    honest = judge(reference, open_engine(exported.path, threads=1), images, thresholds=limits)
    assert honest.figures["mask_shift"] == 0 and honest.passed


def test_displacement_is_no_matter_of_noise_or_of_flat_masks():
    random = np.random.default_rng(0)
    masks = np.cumsum(random.random((5, 12, 12)), axis=2) / 12
    logits = np.zeros((5, 2), np.float32)

    def moved(found: np.ndarray) -> int:
        return displacement(Answers(logits=logits, masks=masks), Answers(logits=logits, masks=found))

    assert moved(masks + random.normal(0, 0.02, masks.shape)) == 0
    assert moved(np.roll(masks, 1, axis=1) + random.normal(0, 0.02, masks.shape)) == 1
    hardly = [Answers(logits=logits, masks=0.5 + random.normal(0, 1e-7, masks.shape)) for _ in range(20)]
    assert {displacement(one, two) for one in hardly for two in hardly} == {0}, "rounding decides nothing"
    noisy = [Answers(logits=logits, masks=0.5 + random.normal(0, 0.02, masks.shape)) for _ in range(20)]
    assert {displacement(one, two) for one in noisy for two in noisy} == {0}
    flat = Answers(logits=logits, masks=np.full((5, 12, 12), 0.5))
    assert displacement(flat, flat) == 0 and displacement(flat, Answers(logits=logits, masks=masks)) == 0


def test_a_graph_that_is_wrong_at_other_sizes_only(bundle, exported, tmp_path):
    config = GraphConfig(resize=True)
    export_onnx(bundle, tmp_path / "model.onnx", config=config)
    reference, images = TorchEngine(bundle.path, bundle=bundle, config=config), from_samples(bundle.samples, 4)
    engine = open_engine(tmp_path / "model.onnx", threads=1)
    assert judge(reference, engine, images, thresholds=Thresholds()).passed
    infer = engine.infer
    engine.infer = lambda pixels: infer(pixels if pixels.shape[1] == 64 else pixels[:, ::-1])
    for limits, kinds in ((Thresholds(), {LogitsError, MaskError}), (Thresholds.of("int8"), {MaskError})):
        errors = judge(reference, engine, images, thresholds=limits).errors
        assert {type(error) for error in errors} == kinds
        assert {error.figure.split(" at ")[-1] for error in errors} == {"97x64", "131x73"}


def test_a_good_engine_passes_with_boxes(exported, bundle, tmp_path, capsys):
    write_planted(tmp_path, size=72, per_class_train=1, per_class_val=2)
    report = tmp_path / "report.html"
    words = ["--model", bundle.path, "--engine", exported.path, "--data", tmp_path, "--images", 8, "--report", report]
    command.main([str(word) for word in words])
    said = capsys.readouterr().out
    assert "parity on 8 images" in said and "dLE +0.0000" in said
    page, record = report.read_text(), json.loads(report.with_suffix(".json").read_text())
    assert page.count("data:image/png;base64,") == 8 * 4 and "Passed" in page
    assert set(record) == {
        "model", "engine", "engine_sha256", "kind", "provider", "precision", "images", "images_sha256", "notes",
        "passed", "errors", "figures", "thresholds",
    }  # fmt: skip
    assert set(record["figures"]) >= {
        "n_images", "logits_max_abs", "logits_mean_abs", "mask_max_abs", "mask_mean_abs", "top1_agreement", "mask_iou",
        "rank_correlation", "dLE", "dF1", "batch",
    }  # fmt: skip


def test_om_is_compared_where_the_classes_are_known(exported, bundle, tmp_path):
    write_planted(tmp_path, size=72, per_class_train=1, per_class_val=2)
    classes = sorted(path.name for path in (tmp_path / "val").iterdir())
    known = {"data_classes": classes, "class_index": list(range(len(classes)))}
    images = from_folder(tmp_path, size=64, geometry="squash", count=8, **known)
    engine, reference = open_engine(exported.path, threads=1), TorchEngine(bundle.path, bundle=bundle)
    figures = judge(reference, engine, images, thresholds=Thresholds()).figures
    assert figures["dOM"] == 0 and figures["reference_OM"] >= figures["reference_LE"] > 0


def test_a_failure_exits_with_1_and_shows_the_worst(exported, bundle, tmp_path, complaint):
    model = onnx.load(exported.path)
    shifted_mask(model)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    line = complaint(command, "--model", bundle.path, "--engine", path, "--images", 6, "--threads", 1, status=1)
    assert "fails the parity gate: mask_max_abs is" in line and "model.onnx.parity.html" in line
    assert "Failed" in Path(f"{path}.parity.html").read_text()


def test_an_engine_that_answers_no_numbers(exported, bundle, tmp_path, complaint):
    model = onnx.load(exported.path)
    rewire(
        model, "mask", helper.make_node("Mul", ["before", "nothing"], ["mask"]), nothing=np.array(np.nan, np.float32)
    )
    path, report = tmp_path / "model.onnx", tmp_path / "report.html"
    onnx.save(model, path)
    words = ("--model", bundle.path, "--engine", path, "--images", 3, "--threads", 1, "--report", report)
    assert "mask_max_abs is nan" in complaint(command, *words, status=1)
    record = json.loads(report.with_suffix(".json").read_text(), parse_constant=pytest.fail)  # no NaN, which is no JSON
    assert record["figures"]["mask_max_abs"] is None and not record["passed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "report.html", "report.json"]


def test_a_report_that_finds_no_room_for_its_pictures(exported, bundle, tmp_path, complaint, room_for):
    words = ("--model", bundle.path, "--engine", exported.path, "--images", 2, "--threads", 1)
    with room_for(20_000):
        line = complaint(command, *words, "--report", tmp_path / "report.html")
    assert "cannot write" in line
    assert list(tmp_path.iterdir()) == []


def test_an_engine_of_another_bundle(exported, make_bundle, complaint):
    other = make_bundle(samples=2, target_area=True)
    line = complaint(command, "--model", other.path, "--engine", exported.path)
    assert "was made from the bundle" in line


def test_wrong_data(exported, bundle, tmp_path, complaint):
    words = ("--model", bundle.path, "--engine", exported.path, "--data")
    assert "no such folder" in complaint(command, *words, tmp_path / "nothing")
    assert "no readable image" in complaint(command, *words, tmp_path)


def test_data_of_other_classes_are_still_images(bundle, tmp_path):
    write_planted(tmp_path, size=72, per_class_train=1, per_class_val=1)
    spec = bundle.spec
    images = from_folder(
        tmp_path, size=64, geometry="squash", count=5, data_classes=spec.data_classes, class_index=spec.class_index
    )
    assert images.images.shape == (5, 64, 64, 3) and images.targets is None and images.annotated == 5
    with pytest.raises(UsageError, match="has none of the folders"):
        from_folder(tmp_path, size=64, geometry="squash", count=5, splits=("test",))


def test_figures_of_masks():
    left, right = np.zeros((4, 4)), np.zeros((4, 4))
    left[:, :2], right[:, 1:3] = 1, 1
    assert mask_iou(left, right) == pytest.approx(1 / 3)
    assert mask_iou(np.full((4, 4), 0.5), np.full((4, 4), 0.4)) == 1  # neither has a cell above its mean
    ramp = np.linspace(0, 1, 16).reshape(4, 4)
    assert rank_correlation(ramp, ramp**3) == pytest.approx(1, abs=1e-2)  # the order counts, not the value
    assert rank_correlation(ramp, 1 - ramp) == pytest.approx(-1)
    assert rank_correlation(ramp, np.ones((4, 4))) == 0


def test_figures_that_are_no_numbers_fail():
    figures = dict.fromkeys(("logits_max_rel", "logits_mean_rel", "mask_max_abs", "mask_mean_abs"), float("nan"))
    figures |= {"top1_agreement": 1.0, "mask_iou": 1.0, "rank_correlation": 1.0, "mask_shift": 0}
    figures["outputs"] = {}
    figures["batch"] = {"equal_rows": {"1": 0.0}, "by_size": {}, "order": 0.0}
    kinds = [type(error) for error in check(figures, Thresholds())]
    assert kinds == [LogitsError, LogitsError, MaskError, MaskError]


def test_worse_boxes_fail_and_better_ones_do_not():
    figures = dict.fromkeys(("logits_max_rel", "logits_mean_rel", "mask_max_abs", "mask_mean_abs"), 0.0)
    figures |= {"top1_agreement": 1.0, "mask_iou": 1.0, "rank_correlation": 1.0, "mask_shift": 0}
    figures |= {"dLE": 0.03, "dF1": 0.03}
    figures["outputs"] = {}
    figures["batch"] = {"equal_rows": {"1": 0.0}, "by_size": {}, "order": 0.0}
    assert [type(error) for error in check(figures, Thresholds())] == [LocalisationError]
    assert check(figures, Thresholds().with_drop(0.05)) == ()
    figures |= {"mask_iou": 0.99, "outputs": {"mask_upsampled": 0.5}}
    assert Thresholds.of("int8").mask_iou < 0.99  # what is asked for counts, not what the precision would be forgiven
    kinds = [type(error) for error in check(figures, Thresholds.of("int8").with_drop(0.005))]
    assert kinds == [MaskShapeError, LocalisationError]
    assert MaskError in [type(error) for error in check(figures, Thresholds())]


def test_noise_stands_in_where_there_is_nothing_else():
    noise = from_noise(50, 3)
    assert noise.images.shape == (3, 50, 50, 3) and noise.images.std() > 40
    assert np.array_equal(noise.images, from_noise(50, 3).images)

"""The parity gate: five saboteurs, five failures; and what it says of engines that are alright."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from export import parity as command
from export.engine import OnnxEngine, as_soft_mask, open_engine
from export.figures import Answers, displacement, mask_iou, rank_correlation
from export.gate import (
    BatchError,
    LocalisationError,
    LogitsError,
    MaskError,
    MaskShapeError,
    Thresholds,
    Top1Error,
    check,
    judge,
    untried_batches,
)
from export.gate_images import from_folder, from_noise, from_samples
from export.graph import GraphConfig
from export.onnx import export_onnx
from export.torch_engine import TorchEngine
from export.verify import verdict_lines
from pipeline.data.planted import write_planted
from pipeline.errors import UsageError
from tests.export._saboteurs import SABOTEURS, rewire, shifted_mask


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


def test_one_level_of_a_stored_mask_is_no_dependence_on_the_batch(exported, bundle):
    """A mask in bytes turns the least difference before it into one level, which is more than float32 may differ by."""

    class Flipping(OnnxEngine):
        """Gives masks in bytes, of which the first cell differs by ``levels`` in every batch of more than one image."""

        levels = 0

        def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
            found = super().outputs(images)
            mask = np.clip(np.round(255 * found["mask"]), 3, 250).astype(np.uint8)
            mask[:, 0, 0] += self.levels * (len(images) > 1)
            return found | {"mask": mask}

        def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found = self.outputs(images)
            return found["logits"], as_soft_mask(found["mask"])

    engine = Flipping(exported.path, provider="cpu", threads=1)
    reference, images = TorchEngine(bundle.path, bundle=bundle), from_samples(bundle.samples, 4)
    limits = replace(Thresholds(), mask_mean_abs=1.0, mask_max_abs=1.0)
    for engine.levels, kinds in ((1, []), (2, [BatchError])):
        verdict = judge(reference, engine, images, thresholds=limits, largest_batch=4)
        assert [type(error) for error in verdict.errors if isinstance(error, BatchError)] == kinds


def test_a_tie_is_told_but_no_failure(exported, bundle):
    """Another first class where the first two were alike is no fault, and still another answer, which users are told."""

    class Leaning(OnnxEngine):
        """Says of the first of four images that two classes are alike but for a hair, towards ``lean``."""

        lean = 0.0

        def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logits, masks = super().infer(images)
            logits = logits.copy()
            top = np.abs(logits).max() + 1
            logits[:, :2] = [top, top - 5]
            logits[: max(0, len(images) - 3), 1] = top + self.lean
            return logits, masks

    reference, tested = (Leaning(exported.path, provider="cpu", threads=1) for _ in range(2))
    tested.lean, reference.lean = 1e-5, -1e-5
    images = from_samples(bundle.samples, 4)
    verdict = judge(reference, tested, images, thresholds=Thresholds(), largest_batch=4)
    assert verdict.figures["top1_strict_agreement"] == 0.75 and verdict.figures["top1_agreement"] == 1
    assert not [error for error in verdict.errors if isinstance(error, Top1Error)]
    lines = verdict_lines(verdict, images, [])
    assert any(
        "top-1 agreement 0.7500 (1.0000 where the reference's first two are not alike)" in line for line in lines
    )


def test_batches_that_were_not_tried_are_named(exported, bundle):
    engine, reference = open_engine(exported.path, threads=1), TorchEngine(bundle.path, bundle=bundle)
    verdict = judge(
        reference,
        engine,
        from_samples(bundle.samples, 2),
        thresholds=Thresholds(),
        batches=(1, 8, 256),
        largest_batch=8,
    )
    (note,) = untried_batches(verdict, (1, 8, 256))
    assert note.startswith("batches of 256 were not tried: on a CPU the largest one compared is 8")
    assert untried_batches(verdict, (1, 8)) == []


def test_noise_stands_in_where_there_is_nothing_else():
    noise = from_noise(50, 3)
    assert noise.images.shape == (3, 50, 50, 3) and noise.images.std() > 40
    assert np.array_equal(noise.images, from_noise(50, 3).images)

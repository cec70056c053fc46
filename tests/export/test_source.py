"""What an export starts from, and on which images it is calibrated and judged."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from export import precision
from export.gate_images import from_noise, from_samples
from export.judged import Judging, check_source, judging_images
from export.precision import Rewritten
from export.source import Source, calibration_images, from_graph
from pipeline.data.planted import write_planted


@pytest.fixture(scope="module")
def source(exported, bundle) -> Source:
    return replace(from_graph(exported.path), path=bundle.path, bundle=bundle)


def flags(**given: object) -> SimpleNamespace:
    return SimpleNamespace(**{"calib_data": None, "parity_data": None, "calib_images": 512} | given)


def test_a_rewritten_graph_has_no_speed_before_it_is_measured(source):
    assert source.manifest.throughput is not None, "the float32 graph's, which is another's"
    rewritten = Rewritten(model=source.model, stand_in=None, precision="fp16", details={})
    manifest = source.describe(rewritten, None, "minmax", rebuild="")
    assert manifest.throughput is None and manifest.parity is None


def test_samples_that_ranges_were_measured_on_do_not_judge_them(source, bundle, tmp_path):
    calibration = calibration_images(source, flags())
    assert calibration is not None and np.array_equal(calibration.images, bundle.samples[::2])
    images, notes = judging_images(source, Judging(), calibration)
    assert np.array_equal(images.images, bundle.samples[1::2]) and notes == []
    assert len(judging_images(source, Judging(images=5), calibration)[0].images) == 5
    write_planted(tmp_path, size=72, per_class_train=1, per_class_val=1)
    all_of_them = calibration_images(source, flags(parity_data=str(tmp_path)))
    assert all_of_them is not None and len(all_of_them.images) == len(bundle.samples)


def test_images_that_have_to_do_for_both_are_said_to(source, bundle):
    images, notes = judging_images(source, Judging(images=6), from_samples(bundle.samples, len(bundle.samples)))
    assert len(images.images) == 6
    assert notes == ["judged on images of which 6 of 6 were calibrated on too: give --parity-data others"]


def test_a_handful_that_was_not_calibrated_on_is_too_few_to_judge_by(source, bundle):
    """Where a folder is hardly larger than what was calibrated on, all of it judges, and that is said."""
    samples = bundle.samples
    most = len(samples) - len(samples) // 4
    images, notes = judging_images(source, Judging(images=len(samples)), from_samples(samples, most))
    assert len(images.images) == len(samples)
    assert notes == [
        f"judged on images of which {most} of {len(samples)} were calibrated on too: give --parity-data others"
    ]


def test_images_that_are_missing_are_not_blamed_on_a_bundle_that_was_not_given(exported, tmp_path, complaint):
    line = complaint(
        precision, "--onnx", exported.path, "--out", tmp_path / "low.onnx", "--precision", "int8-cpu", "--threads", 1
    )
    assert "needs images to calibrate on, and there is no bundle with samples; give --calib-data DIR" in line
    assert from_noise(8, 1).source == "generated noise (no folder of images was given, and no bundle with samples)"


def test_a_graph_that_nothing_was_held_against_is_said_to_be(exported):
    notes = check_source(from_graph(exported.path), Judging(threads=1))
    assert notes == ["no bundle was at hand, so model.onnx itself was taken for right"]


def test_a_graph_that_fails_is_sent_to_a_search_of_its_own_command(source, bundle, tmp_path, monkeypatch, complaint):
    monkeypatch.setattr("export.trace.trace", lambda *_: source.model)  # which takes seconds
    words = ("--model", bundle.path, "--out", tmp_path / "low.onnx", "--threads", 1, "--parity-images", 4)
    line = complaint(precision, *words, "--precision", "int8-cpu", "--max-drop", 0, "--calib-images", 4, status=1)
    assert line.endswith("; --search raises the layers that hurt") and "export.trt" not in line

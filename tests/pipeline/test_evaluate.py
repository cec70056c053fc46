"""The evaluation command: its keys, its figures by other means, its quirks, and what it says when something is wrong."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import evaluate as command
from pipeline.bundle import Bundle, save_bundle
from pipeline.data.decode import read_image
from pipeline.errors import UsageError, WorkError
from pipeline.evaluate import evaluate, run_evaluation, write_metrics
from pipeline.metrics.boxes import mask_box
from pipeline.metrics.examples import Examples, mask_to_input
from pipeline.metrics.faithfulness import FAITHFULNESS, Protocol
from pipeline.metrics.tally import METRICS
from tests.pipeline._evaluation import SIZE, planted_data, untrained_bundle

KEYS = {
    "OM", "LE", "F1", "F1a", "SM", "SM1", "SM2", "sm_acc", "top1", "top5", "PxAP", "MaxBoxAccV2", "mask_mean",
    "mask_std", "binarized", "entropy", "tv", "mask_iou", "n_images",
}  # fmt: skip
"""The public keys of `metrics.json`."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_data(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return untrained_bundle(Path("untrained"))


@pytest.fixture(scope="module")
def metrics(bundle: Bundle, data: Path) -> dict:
    return evaluate(bundle, data, batch_size=7, progress=False)


def test_the_keys_are_the_public_ones(metrics: dict) -> None:
    assert set(METRICS) == KEYS
    assert set(metrics) == KEYS | {"intervals", "differences", "baselines", "protocol"}
    assert set(metrics["baselines"]) == {"whole", "center", "gaussian", "cam"}
    for row in metrics["baselines"].values():
        assert set(row) == KEYS | {"intervals"}
    for row in (metrics, *metrics["baselines"].values()):
        assert all(row[name] is not None for name in KEYS)
        fractions = KEYS - {"SM", "SM1", "SM2", "n_images"}
        assert all(0 <= row[name] <= 1 for name in fractions)


def test_the_figures_agree_with_a_loop_over_the_images(metrics: dict, bundle: Bundle, data: Path) -> None:
    boxes: dict[str, tuple[float, ...]] = {}
    with (data / "boxes.csv").open() as file:
        for row in csv.DictReader(file):
            boxes[row["path"]] = tuple(float(row[name]) for name in ("x0", "y0", "x1", "y1"))
    spec = bundle.spec
    misses, errors, right, areas = [], [], [], []
    for path, (x0, y0, x1, y1) in boxes.items():
        x = (torch.from_numpy(read_image(data / path)).float() / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
        with torch.no_grad():
            logits, mask = bundle.model(x.permute(2, 0, 1)[None])
        correct = int(logits.argmax()) == spec.data_classes.index(path.split("/")[1])
        native = mask[0, 0].numpy()
        box = mask_box(native)
        assert box is not None
        u0, v0, u1, v1 = (SIZE / native.shape[0] * edge for edge in box)
        shared = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
        hit = shared / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared) > 0.5
        misses.append(not hit)
        errors.append(not (hit and correct))
        right.append(correct)
        areas.append(native.mean())
    assert metrics["n_images"] == len(boxes)
    expected = {"LE": misses, "OM": errors, "top1": right, "mask_mean": areas}
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(np.mean(values), abs=1e-6), name
    assert metrics["mask_std"] == pytest.approx(np.std(areas, ddof=1), abs=1e-6)


def test_baselines_are_what_they_say(metrics: dict) -> None:
    whole, center = metrics["baselines"]["whole"], metrics["baselines"]["center"]
    assert whole["mask_mean"] == whole["binarized"] == 1 and whole["SM1"] == 0
    assert center["mask_mean"] == pytest.approx((46 / 64) ** 2)
    assert whole["sm_acc"] == whole["top1"] == metrics["top1"]  # its cut-out is the image
    difference = metrics["differences"]["center"]["LE"]
    assert difference["value"] == pytest.approx(metrics["LE"] - center["LE"])
    low, high = difference["interval"]
    assert low <= difference["value"] <= high


def test_batches_do_not_matter(metrics: dict, bundle: Bundle, data: Path) -> None:
    other = evaluate(bundle, data, batch_size=3, progress=False)
    for name in KEYS:
        assert other[name] == pytest.approx(metrics[name], abs=1e-5), name


def test_a_larger_head_is_judged_over_all_its_outputs(data: Path) -> None:
    bundle = untrained_bundle(Path("untrained"), outputs=40)
    evaluation = run_evaluation(bundle, data, batch_size=16, progress=False)
    guesses, targets = [], []
    for batch in evaluation.examples.batches(16):
        for example in batch:
            x = torch.from_numpy(np.asarray(example.image)).float() / 255
            x = ((x - torch.tensor(bundle.spec.mean)) / torch.tensor(bundle.spec.std)).permute(2, 0, 1)[None]
            with torch.no_grad():
                guesses.append(int(bundle.model(x)[0].argmax()))
            targets.append(bundle.spec.class_index[example.label])
    assert evaluation.metrics["top1"] == np.mean(np.array(guesses) == np.array(targets))
    assert "40 outputs" in evaluation.metrics["protocol"]["class_rule"]


def test_without_truth_the_figures_that_need_it_are_null(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "val", tmp_path / "val")
    metrics = evaluate(bundle, tmp_path, progress=False)
    missing = {name for name in KEYS if metrics[name] is None}
    assert missing == {"OM", "LE", "F1", "F1a", "PxAP", "MaxBoxAccV2", "mask_iou"}
    assert metrics["intervals"]["LE"] is None and "LE" not in metrics["differences"]["cam"]
    json.dumps(metrics, allow_nan=False)


def test_annotations_may_lie_elsewhere(bundle: Bundle, data: Path, tmp_path: Path, metrics: dict) -> None:
    shutil.copytree(data / "val", tmp_path / "set" / "val")
    shutil.copy(data / "boxes.csv", tmp_path / "b.csv")
    shutil.copytree(data / "masks", tmp_path / "m")
    found = evaluate(bundle, tmp_path / "set", boxes=tmp_path / "b.csv", masks=tmp_path / "m", progress=False)
    assert {name: found[name] for name in KEYS} == pytest.approx({name: metrics[name] for name in KEYS}, abs=1e-5)


def test_published_quirks(metrics: dict, bundle: Bundle, data: Path) -> None:
    published = evaluate(bundle, data, batch_size=7, compat="published", progress=False)
    assert published["protocol"]["compat"] == "published" and metrics["protocol"]["compat"] is None
    assert published["baselines"]["center"]["OM"] == published["baselines"]["center"]["LE"]
    assert published["entropy"] < metrics["entropy"]  # half of it
    assert published["SM1"] < metrics["SM1"]  # every box is a row and a column short
    assert published["PxAP"] != metrics["PxAP"]  # a tenth of the thresholds
    assert published["PxAP"] == pytest.approx(metrics["PxAP"], abs=0.02)
    for protocol, step in ((published["protocol"], 0.01), (metrics["protocol"], 0.001)):
        assert f"thresholds every {step}," in json.dumps(protocol)
    for name in ("top1", "mask_mean", "binarized"):
        assert published[name] == pytest.approx(metrics[name], abs=1e-5)


def test_a_masker_that_takes_a_class_is_told_the_one_that_is_asked_for(data: Path, tmp_path: Path) -> None:
    bundle = untrained_bundle(tmp_path, class_conditional=True)
    masker = bundle.model.masker
    told: list[int] = []
    masker.register_forward_pre_hook(lambda _m, _a, given: told.extend(given["labels"].tolist()), with_kwargs=True)
    true = [k for k in range(len(bundle.spec.class_index)) for _ in range(2)]
    by_label = evaluate(bundle, data, explain="label", baselines=(), progress=False)
    assert sorted(told) == true
    told.clear()
    by_answer = evaluate(bundle, data, explain="predicted", baselines=(), progress=False)
    assert sorted(told) != true  # an untrained classifier has a favourite
    assert by_label["mask_mean"] != by_answer["mask_mean"]


def test_a_wanted_area_reaches_the_masker(data: Path, tmp_path: Path) -> None:
    bundle = untrained_bundle(tmp_path, target_area=True)
    told: list[float] = []
    bundle.model.masker.register_forward_pre_hook(
        lambda _m, _a, given: told.extend(given["target_area"].tolist()), with_kwargs=True
    )
    evaluate(bundle, data, target_area=0.25, baselines=(), progress=False)
    assert set(told) == {0.25}


def test_the_limit_draws_by_the_seed(bundle: Bundle, data: Path) -> None:
    draws = [Examples(data, bundle.spec, limit=5, seed=seed).paths for seed in (0, 0, 1)]
    assert len(draws[0]) == 5 and draws[0] == draws[1] != draws[2]


def test_the_saliency_metric_may_ask_another_classifier(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    assert evaluate(bundle, data, limit=4, original="none", progress=False)["SM"] is None
    save_bundle(tmp_path / "b", bundle.model, bundle.spec)
    own = evaluate(bundle, data, limit=4, progress=False)
    other = evaluate(bundle, data, limit=4, original=str(tmp_path / "b"), progress=False)
    assert other["SM"] == pytest.approx(own["SM"], abs=1e-6)
    assert str(tmp_path / "b") in other["protocol"]["SM"]


def test_a_damaged_image_is_left_out_and_named(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "set")
    victim = next((tmp_path / "set" / "val").rglob("*.jpg"))
    victim.write_bytes(b"no picture")
    metrics = evaluate(bundle, tmp_path / "set", progress=False)
    (left_out,) = metrics["protocol"]["data"]["unreadable"]
    assert victim.name in left_out and "undecodable" in left_out
    for path in (tmp_path / "set" / "val").rglob("*.jpg"):
        path.write_bytes(b"no picture")
    with pytest.raises(WorkError, match="not one image"):
        evaluate(bundle, tmp_path / "set", progress=False)


def test_boxes_for_other_images_are_refused(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("path,class,x0,y0,x1,y1,w,h\nelsewhere/x.jpg,a,0,0,1,1,2,2\n")
    with pytest.raises(UsageError, match=r"no box for any image.*elsewhere/x\.jpg"):
        evaluate(bundle, data, boxes=tmp_path / "b.csv", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "nowhere"),
        ({"--data": "nowhere"}, "nowhere"),
        ({"--split": "holiday"}, "holiday"),
        ({"--boxes": "nowhere.csv"}, "nowhere.csv"),
        ({"--masks": "nowhere"}, "nowhere"),
        ({"--batch-size": "0"}, "--batch-size 0"),
        ({"--limit": "0"}, "--limit 0"),
        ({"--faithfulness": "-1"}, "--faithfulness -1"),
        ({"--original": "nowhere"}, "nowhere"),
        ({"--out": "/proc/none/metrics.json"}, "/proc/none"),
        ({"--target-area": "2"}, "--target-area 2"),
    ],
)
def test_wrong_use_is_one_clear_line(
    change: dict[str, str], message: str, bundle: Bundle, data: Path, tmp_path: Path
) -> None:
    save_bundle(tmp_path / "b", bundle.model, bundle.spec)
    options = {"--model": str(tmp_path / "b"), "--data": str(data), "--out": str(tmp_path / "m.json"), "--limit": "2"}
    with pytest.raises(UsageError) as caught:
        command.main([word for pair in (options | change).items() for word in pair])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_writes_the_figures(
    bundle: Bundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bundle(tmp_path / "b", bundle.model, bundle.spec)
    out = tmp_path / "deep" / "metrics.json"
    command.main(["--model", str(tmp_path / "b"), "--data", str(data), "--out", str(out), "--limit", "4"])
    assert json.loads(out.read_text())["n_images"] == 4
    assert str(out) in capsys.readouterr().out


def test_the_options_are_the_public_ones() -> None:
    options = {option for action in command.parser()._actions for option in action.option_strings}
    assert options == {
        "-h", "--help", "--model", "--data", "--out", "--boxes", "--masks", "--split", "--batch-size", "--limit", "--seed",
        "--report", "--compat", "--original", "--target-area", "--explain", "--faithfulness",
    }  # fmt: skip


def test_no_nan_is_ever_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_metrics({"LE": float("nan")}, tmp_path / "m.json")


def test_a_true_mask_follows_the_picture_into_the_crop() -> None:
    from pipeline.data.geometry import view_of

    mask = np.zeros((40, 80), dtype=np.uint8)
    mask[:, 20:40] = 1
    mask[:, 40:60] = 255
    cropped = mask_to_input(mask, view_of(80, 40, 16, "crop"), 16)
    assert (cropped[:, :8] == 1).all() and (cropped[:, 8:] == 255).all()
    squashed = mask_to_input(mask, view_of(80, 40, 16, "squash"), 16)
    assert squashed[0].tolist() == [0] * 4 + [1] * 4 + [255] * 4 + [0] * 4


def test_faithfulness_is_measured_when_asked_for(bundle: Bundle, data: Path) -> None:
    protocol = Protocol(steps=2)
    metrics = evaluate(bundle, data, limit=3, faithfulness=2, faithfulness_protocol=protocol, progress=False)
    for row in (metrics, *metrics["baselines"].values()):
        assert all(0 <= row[name] <= 1 for name in FAITHFULNESS)
    assert metrics["protocol"]["faithfulness"]["n"] == 2 and metrics["protocol"]["faithfulness"]["steps"] == 2

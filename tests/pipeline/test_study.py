"""The study: its grid, its table, its records, and one small run of it."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pipeline.backbone import choose_taps, create_classifier, pyramid, tap_classifier
from pipeline.batchnorm_statistics import estimate_statistics
from pipeline.connectivity import compare_classifiers, interpolate, loss_barrier
from pipeline.errors import UsageError
from pipeline.presets import PRESETS
from pipeline.reporting import FolderReporter
from pipeline.settings import configure
from pipeline.study import missing
from pipeline.study_rows import CORE, ROWS, choose_rows, definition_of
from pipeline.study_table import findings, interval, summarise, write_study
from pipeline.study_trial import DEFINITION, run_trial
from pipeline.training import TrainingPlan


def record(row: str, seed: int, le: float | None, **more) -> dict:
    figures = {"LE": le, "OM": le, "F1": 0.5, "PxAP": None, "MaxBoxAccV2": 0.5, "mask_mean": 0.3, "top1": 0.9}
    return {"row": row, "seed": seed, "config": {"arguments": []}, "metrics": figures, **more}


def test_every_row_is_a_method() -> None:
    for row in ROWS.values():
        configure(row.preset, row.settings)
        assert row.reference in ROWS
    assert [row.name for row in CORE] == [
        "in-frozen",
        "out-frozen",
        "both-frozen",
        "in-joint",
        "out-joint",
        "both-joint",
    ]
    assert [row.name for row in choose_rows("gumbel,core,gumbel")] == ["gumbel", *(row.name for row in CORE)]
    with pytest.raises(UsageError, match="core, all, or some of in-frozen"):
        choose_rows("nothing")


def test_the_interval_is_students() -> None:
    mean, low, high = interval([0.40, 0.42, 0.47])
    assert mean == pytest.approx(0.43)
    half = 4.302653 * np.std([0.40, 0.42, 0.47], ddof=1) / math.sqrt(3)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-6)
    assert math.isnan(interval([0.4])[1])


def test_differences_are_paired_by_seed() -> None:
    records = [record("both-frozen", seed, le) for seed, le in enumerate((0.50, 0.40, 0.45))]
    records += [record("in-frozen", seed, le) for seed, le in ((0, 0.53), (1, 0.44), (3, 0.9))]
    line = next(line for line in summarise(records) if line["row"] == "in-frozen")
    assert line["pairs"] == 2 and line["seeds"] == 3
    assert line["LE_difference"][0] == pytest.approx(0.035)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [((-0.05, -0.052, -0.048), "holds"), ((0.05, 0.052, 0.048), "does not hold"), ((0.05, -0.05, 0.01), "not decided")],
)
def test_findings_are_said_plainly(gains: tuple[float, ...], verdict: str) -> None:
    records = [record("both-frozen", seed, 0.5) for seed in range(3)]
    records += [record("both-joint", seed, 0.5 + gain) for seed, gain in enumerate(gains)]
    (sentence,) = findings(summarise(records))
    assert verdict in sentence and "3 seeds" in sentence


def test_a_run_without_boxes_is_no_pair() -> None:
    records = [record("both-frozen", 0, 0.5), record("in-frozen", 0, 0.6), record("both-frozen", 1, 0.5)]
    records += [record("in-frozen", 1, None)]
    assert {line["row"]: line["pairs"] for line in summarise(records)}["in-frozen"] == 1


SHARED = ["--data", "/here/photos", "--steps", "200", "--init", "timm:x", "--init-arg", "a=1", "--init-arg", "b=2"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (["--steps", "7"], "7 steps"),
        (["--data", "drawings"], "200 steps, --data drawings"),
        (["--init", "resnet50"], "200 steps, --init resnet50"),
        (["--weights", "w.pt"], "200 steps, --weights w.pt"),
    ],
)
def test_runs_of_another_setup_are_neither_compared_nor_averaged(other: list[str], says: str) -> None:
    """Its length, its data, its classifier or its weights: a folder may hold records of several."""
    flag = other[0]
    arguments = [*SHARED, *other] if flag not in SHARED else list(SHARED)
    if flag in SHARED:
        arguments[SHARED.index(flag) + 1] = other[1]
    records = [record("both-frozen", seed, 0.5, config={"arguments": SHARED}) for seed in (0, 1)]
    records += [record("both-frozen", 2, 0.9, config={"arguments": arguments})]
    records += [record("few-shot-1", 0, 0.6, config={"arguments": [*SHARED, "--per-class", "1"]})]
    records += [record("few-shot-1", 1, 0.6, config={"arguments": [*arguments, "--per-class", "1"]})]
    table = summarise(records)
    found = [(line["row"], line["LE"][0], line["seeds"], line["pairs"]) for line in table]
    assert found == [
        ("both-frozen", 0.5, 2, 0), ("both-frozen", 0.9, 1, 0), ("few-shot-1", 0.6, 1, 1), ("few-shot-1", 0.6, 1, 0),
    ]  # fmt: skip
    assert table[1]["length"].startswith(says)


def test_the_folder_above_the_data_does_not_count() -> None:
    elsewhere = [text.replace("/here/", "/elsewhere/") for text in SHARED]
    records = [record("both-frozen", 0, 0.5, config={"arguments": SHARED})]
    records += [record("in-frozen", 0, 0.6, config={"arguments": elsewhere})]
    assert [line["pairs"] for line in summarise(records) if line["row"] == "in-frozen"] == [1]


def test_runs_of_a_time_show_their_steps() -> None:
    arguments = {"arguments": ["--budget", "5m"]}
    records = [record("both-frozen", k, 0.5, steps=steps, config=arguments) for k, steps in enumerate((140, 123))]
    assert summarise(records)[0]["length"] == "5m, 123 to 140 steps"
    assert summarise(records[:1])[0]["length"] == "5m, 140 steps"


def test_findings_of_two_setups_are_told_apart() -> None:
    records = [
        record(row, 0, 0.5, config={"arguments": ["--steps", str(steps)]})
        for row in ("both-frozen", "both-joint")
        for steps in (7, 9)
    ]
    seven, nine = findings(summarise(records))
    assert "freezing it, 7 steps" in seven and "freezing it, 9 steps" in nine


def test_what_is_missing(tmp_path: Path) -> None:
    rows = choose_rows("both-frozen,few-shot-1")
    assert [(row.name, seed) for row, seed in missing(rows, range(2), tmp_path, [])] == [
        ("both-frozen", 0), ("few-shot-1", 0), ("both-frozen", 1), ("few-shot-1", 1),
    ]  # fmt: skip
    config = {"preset": "fix", "settings": [], "arguments": []}
    path = tmp_path / "both-frozen-0.json"
    path.write_text(json.dumps(record("both-frozen", 0, 0.5) | {"config": config}))
    assert len(missing(rows, range(2), tmp_path, [])) == 3
    with pytest.raises(UsageError, match="another --out"):
        missing(rows, range(2), tmp_path, ["--steps", "7"])
    for other in ({"preset": "ca"}, {"settings": ["fill=blur"]}):  # the row meant something else when it was trained
        path.write_text(json.dumps(record("both-frozen", 0, 0.5) | {"config": config | other}))
        with pytest.raises(UsageError, match="the row both-frozen was"):
            missing(rows, range(2), tmp_path, [])


def test_a_record_of_a_preset_that_has_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = choose_rows("both-frozen")
    kept = record("both-frozen", 0, 0.5) | {"config": {"preset": "fix", "settings": [], "arguments": []}}
    kept["definition"] = definition_of(rows[0], 0, [])
    (tmp_path / "both-frozen-0.json").write_text(json.dumps(kept))
    assert not missing(rows, range(1), tmp_path, [])
    monkeypatch.setitem(PRESETS, "fix", replace(PRESETS["fix"], weight_out=2.0))
    with pytest.raises(UsageError, match="was preset fix with no setting and other constants; move it away"):
        missing(rows, range(1), tmp_path, [])
    del kept["definition"]  # a record of an earlier release
    (tmp_path / "both-frozen-0.json").write_text(json.dumps(kept))
    assert not missing(rows, range(1), tmp_path, [])


def test_a_definition_is_all_that_a_trial_is_trained_by() -> None:
    row = ROWS["both-frozen"]
    same = definition_of(row, 0, ["--steps", "7"])
    assert same == definition_of(row, 0, ["--steps", "7"]) and len(same) == 16
    others = [(row, 1, ["--steps", "7"]), (row, 0, ["--steps", "8"]), (ROWS["fill-blur"], 0, ["--steps", "7"])]
    others += [(ROWS["few-shot-1"], 0, ["--steps", "7"])]
    assert len({same, *(definition_of(*other) for other in others)}) == 5


def test_the_barrier_is_not_that_of_mixed_statistics() -> None:
    """Two networks of one function, whose convolutions have another scale: so has every network between them."""
    torch.manual_seed(0)
    classifier = create_classifier("torchvision", "resnet18", outputs=3, arguments={})
    maps = pyramid("torchvision", classifier, 32)
    before = tap_classifier("torchvision", classifier, choose_taps(maps, (1,)), last_map=None).eval()
    x, targets = torch.randn(16, 3, 32, 32), torch.arange(16) % 3
    estimate_statistics(before, [before], x)
    after = copy.deepcopy(before)
    for module in after.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 10
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean *= 10
            module.running_var *= 100
    with torch.no_grad():
        logits = [network(x).logits for network in (before, interpolate(before, after, 0.5).eval())]
    mixed = F.cross_entropy(logits[1], targets) - F.cross_entropy(logits[0], targets)
    found = compare_classifiers(before, after, x, targets)
    assert abs(float(mixed)) > 0.02 and found["loss_barrier"] < 0.002


def test_only_work_of_the_same_definition_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of other arguments, whole or half done, is neither judged nor resumed."""

    class StoppedError(Exception):
        pass

    def stopped(plan: TrainingPlan, reporter: FolderReporter, *, resume: Path | None, device: str) -> None:
        found.append(resume)
        raise StoppedError

    found: list[Path | None] = []
    monkeypatch.setattr("pipeline.training.train", stopped)
    photos(tmp_path / "data")
    shared = ["--data", str(tmp_path / "data"), "--init", "timm:test_resnet", "--image-size", "32"]
    work = tmp_path / "work"
    kept = work / "state" / "state.pt"

    def begin(length: str) -> Path | None:
        with pytest.raises(StoppedError):
            run_trial(ROWS["both-frozen"], 0, [*shared, "--steps", length], folder=work, threads=1)
        return found[-1]

    assert begin("4") is None
    kept.parent.mkdir()
    kept.touch()
    assert begin("4") == kept.parent
    (kept.parent / "bundle").mkdir()
    assert begin("5") is None and not kept.exists()  # finished, with another length
    kept.parent.mkdir()
    kept.touch()
    (work / DEFINITION).unlink()  # of an earlier release
    assert begin("5") is None and not kept.exists()


def test_the_barrier_is_the_height_above_the_straight_line() -> None:
    assert loss_barrier([1.0, 1.5, 2.0]) == 0
    assert loss_barrier([1.0, 3.0, 2.0]) == pytest.approx(1.5)


def test_a_classifier_beside_itself() -> None:
    torch.manual_seed(0)
    classifier = create_classifier("torchvision", "resnet18", outputs=3, arguments={})
    maps = pyramid("torchvision", classifier, 32)
    backbone = tap_classifier("torchvision", classifier, choose_taps(maps, (1,)), last_map=None).eval()
    x, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    same = compare_classifiers(backbone, backbone, x, targets)
    assert same["agreement"] == 1 and same["loss_barrier"] == pytest.approx(0, abs=1e-6)
    middle = interpolate(backbone, backbone, 0.5).eval()
    assert torch.allclose(middle(x).logits, backbone(x).logits, atol=1e-5)


def photos(data: Path) -> None:
    """A training set of 12 images and a validation set of 8, of two classes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = data / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(120 * label, 120 * label + 100, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.png")


@pytest.mark.timeout(600)
def test_a_small_study_from_start_to_end(tmp_path: Path) -> None:
    """Two rows, two seeds; run again, only a record that is gone is made anew, from the run that is there."""
    photos(tmp_path / "data")
    with (tmp_path / "data" / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "x0", "y0", "x1", "y1", "w", "h"])
        for name in ("dark", "light"):
            writer.writerows([f"val/{name}/{k}.png", name, 5, 5, 30, 30, 40, 40] for k in range(4))
    out = tmp_path / "study"
    command = [sys.executable, "-m", "pipeline.study", "--data", str(tmp_path / "data"), "--out", str(out)]
    command += ["--rows", "both-frozen,in-frozen", "--seeds", "2", "--steps", "4"]
    command += ["--init", "timm:test_resnet", "--batch-size", "4", "--image-size", "32"]
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}
    first = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-3000:]
    records = sorted((out / "records").glob("*.json"))
    assert [path.stem for path in records] == ["both-frozen-0", "both-frozen-1", "in-frozen-0", "in-frozen-1"]
    assert all(path.stat().st_size < 1024 for path in records)
    assert all(len(json.loads(path.read_text())["definition"]) == 16 for path in records)
    assert "both sides instead of masked-in only, frozen classifier" in first.stdout
    assert (out / "study.html").read_text().count("<tr>") == 3 and "in-frozen" in (out / "study.md").read_text()
    made = {path: path.stat().st_mtime_ns for path in records}
    gone = json.loads(records[3].read_text())
    records[3].unlink()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert again.returncode == 0, again.stderr[-2000:]
    assert all(path.stat().st_mtime_ns == made[path] for path in records[:3])
    anew = json.loads(records[3].read_text())
    assert {k: v for k, v in anew.items() if k != "seconds"} == {k: v for k, v in gone.items() if k != "seconds"}
    assert 0 <= anew["cam"] <= 1


def test_a_study_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.study", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    for more, says in (
        (["--rows", "x"], "--rows x"),
        (["--seeds", "0"], "--seeds 0"),
        (["--preset", "ca"], "--preset"),
        ([], "no folder train/"),
    ):
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_table_is_written_in_three_ways(tmp_path: Path) -> None:
    change = {"top1_before": 0.7, "top1_after": 0.9, "agreement": 0.8, "loss_barrier": 0.01}
    records = [
        record(name, seed, 0.4 + 0.01 * seed, classifier=change)
        for name in ("both-joint", "both-frozen")
        for seed in (0, 1)
    ]
    write_study(records, tmp_path, title="Study of <data>")
    page = (tmp_path / "study.html").read_text()
    assert "Study of &lt;data&gt;" in page and "data:image/png;base64," in page
    rows = list(csv.DictReader((tmp_path / "study.csv").open()))
    assert [row["row"] for row in rows] == ["both-frozen", "both-joint"]
    assert float(rows[0]["LE"]) == pytest.approx(0.405) and float(rows[0]["agreement"]) == pytest.approx(0.8)

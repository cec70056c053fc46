"""The paper's recipes: every constant, how rates follow the batch, and what a dry run says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from pipeline.data.batches import Augmentation
from pipeline.data.planted import write_planted
from pipeline.errors import UsageError
from pipeline.planning import plan_training
from pipeline.presets import PRESETS
from pipeline.settings import configure
from pipeline.train import main, parse


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    write_planted(root, seed=0, size=48, per_class_train=2, per_class_val=1)
    return root


def test_every_constant_of_the_paper() -> None:
    """Section 3.3: the same for both, but for the classifier, its population and the size weight."""
    for name, area, population, batchnorm in (
        ("paper-ca", 15.0, (0.5, 100, 30), "sync"),
        ("paper-fix", 10.0, None, "eval"),
    ):
        arguments = parse(["--recipe", name, "--data", "D", "--out", "O"])
        assert (arguments.preset, arguments.init, arguments.weights) == (name, "resnet50", "IMAGENET1K_V1")
        assert (arguments.epochs, arguments.image_size, arguments.geometry) == (12.0, 224, "crop")
        assert arguments.batchnorm == batchnorm and arguments.set == []
        preset = PRESETS[name]
        assert preset.batch_size == 72 and preset.layers == (3, 4) and preset.fill == "zero"
        options = preset.optimisation
        assert (options.masker_rate, options.classifier_rate, options.momentum) == (1e-3, 1e-3, 0.9)
        assert (options.weight_decay, options.clip_norm, options.decay) == (1e-4, 10.0, "steps")
        assert (options.classifier_method, preset.weight_in, preset.weight_out) == ("sgd", 1.0, 1.0)
        assert preset.mask_in is not None and preset.mask_out is not None
        assert (preset.mask_in.lambda_area, preset.mask_out.lambda_area) == (1.0, area)
        assert (preset.mask_in.lambda_tv, preset.mask_out.lambda_tv) == (0.001, 0.001)
        assert (preset.mask_in.objective, preset.mask_out.objective) == ("classification", "entropy")
        assert (preset.mask_in.direction, preset.mask_out.direction) == ("maximize", "maximize")
        assert not preset.relative_units and preset.price.rule == "fixed" and preset.pretraining == 0
        assert preset.augmentation == Augmentation(smallest_area=0.08, aspect=4 / 3, absolute=True, mirror=True)
        drawn = preset.population
        assert (drawn and (drawn.probability, drawn.save_every, drawn.size)) == population


def test_other_flags_win_over_the_recipe() -> None:
    arguments = parse(["--recipe", "paper-ca", "--data", "D", "--out", "O", "--init", "resnet18", "--epochs", "1"])
    assert (arguments.init, arguments.epochs, arguments.weights) == ("resnet18", 1.0, "IMAGENET1K_V1")


def test_rates_follow_the_batch() -> None:
    """Eight times the batch: SGD learns eight times as fast, Adam by the square root; what is set by hand stays."""
    common = ["--recipe", "paper-ca", "--data", "D", "--out", "O", "--batch-size"]
    options = configure("paper-ca", parse([*common, "576"]).set).optimisation
    assert options.classifier_rate == pytest.approx(8e-3)
    assert options.masker_rate == pytest.approx(1e-3 * 8**0.5, rel=1e-5)
    assert parse([*common, "72"]).set == []
    own = configure("paper-ca", parse([*common, "576", "--set", "optimisation.masker_rate=0.1"]).set).optimisation
    assert (own.masker_rate, own.classifier_rate) == (0.1, pytest.approx(8e-3))


def test_a_dry_run_forecasts_and_trains_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    weights = tmp_path / "resnet18.pt"
    torch.save(resnet18(num_classes=10).state_dict(), weights)
    run = ["--recipe", "paper-ca", "--data", str(data), "--out", str(out), "--weights", str(weights)]
    run += ["--init", "resnet18", "--dry-run"]
    main([*run, "--image-size", "64", "--workers", "8", "--epochs", "36"])
    said = capsys.readouterr().out
    assert "length: 10 steps, 720 images shown" in said  # 36 passes over 20 images
    assert "expected: published: LE 35.8" in said
    assert "memory of each of 8 workers" in said and "GPU time" in said
    assert not out.exists()
    with pytest.raises(UsageError, match="give --epochs or --steps"):
        main([*run, "--budget", "10m"])


def test_the_forecast_counts_what_a_step_does(data: Path, tmp_path: Path) -> None:
    """Arithmetic grows with the batch; a frozen classifier costs less memory and work, and keeps no population."""
    from pipeline.forecast import forecast

    weights = tmp_path / "resnet18.pt"
    torch.save(resnet18(num_classes=10).state_dict(), weights)
    found = {}
    for recipe in ("paper-ca", "paper-fix"):
        arguments = [
            "--recipe",
            recipe,
            "--data",
            str(data),
            "--out",
            "O",
            "--weights",
            str(weights),
            "--init",
            "resnet18",
        ]
        found[recipe] = forecast(plan_training(parse([*arguments, "--image-size", "64", "--epochs", "12"])))
    joint, frozen = found["paper-ca"], found["paper-fix"]
    assert joint.step_flops > 1.3 * frozen.step_flops
    assert frozen.weight_bytes < joint.weight_bytes
    assert frozen.population_bytes == 0 and joint.population_bytes > 30 * 44e6
    # A forward of ResNet-18 at 64 pixels is 0.30 GFLOP a picture; a frozen step is three of them and two backward ones.
    per_image = frozen.step_flops / 72
    assert 4 * 0.28e9 < per_image < 7 * 0.32e9

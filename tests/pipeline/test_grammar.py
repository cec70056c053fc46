"""``--set SLOT=VALUE``: what it takes, what it refuses, and where it is written down."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from pipeline.concrete import ConcreteConfig
from pipeline.errors import UsageError
from pipeline.objectives import KLPriorConfig, SideConfig
from pipeline.population import PopulationConfig
from pipeline.presets import PRESETS, Preset
from pipeline.settings import FIXED, configure, describe
from pipeline.spec import MaskerSpec


def test_settings_apply_from_left_to_right() -> None:
    preset = configure("ca", ["mask_out=kl-prior", "mask_out.lambda_area=3", "price.target=0.6", "layers=[3,4]"])
    assert preset.mask_out == KLPriorConfig(lambda_area=3.0)
    assert preset.price.target == 0.6 and preset.layers == (3, 4)
    assert configure("casm-l", ["population.size=3"]).population == PopulationConfig(size=3)
    assert configure("ca", []) is PRESETS["ca"]
    side = configure("ca", ["mask_in.direction=minimize"]).mask_in
    assert isinstance(side, SideConfig) and side == replace(PRESETS["ca"].mask_in, direction="minimize")  # pyright: ignore


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("fill", "SLOT=VALUE"),
        ("colour=red", "no slot 'colour'"),
        ("price.aim=1", "no slot 'aim'"),
        ("price.target=2", "not between 0 and 1"),
        ("classifier=half", "'frozen' or 'joint'"),
        ("mask_in=gradient", "use none, classification"),
        ("fill=paint", "use zero, colour"),
        ("batch_size.x=1", "no slots of its own"),
        ("masker.width=0", "greater than or equal to 1"),
        ("name=mine", "no slot 'name'"),
        ("fakes=0.3", "add --set masker.class_conditional=true"),
        ("fakes=1", "less than 1"),
    ],
)
def test_a_wrong_setting_is_said_in_one_line(setting: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        configure("ca", [setting])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("preset", "settings", "says"),
    [
        ("dabkowski-gal", ["masker.target_area=true"], "neither side asks for the wanted area"),
        (
            "fix",
            ["mask_in=kl-prior", "mask_out=kl-prior", "masker.target_area=true", "price.rule=fixed"],
            "neither side asks for the wanted area",
        ),
        ("ca", ["mask_out=kl-prior", "mask_out.prior=divide"], "add --set mask_out.frequencies=data"),
        ("ca", ["mask_in=kl-prior", "mask_in.class_weight=true"], "mask_in.class_weight=true: with every class alike"),
        ("fix", ["population.size=3"], "population.size=3: a frozen classifier has no earlier states"),
        ("ca", ["population.inert=true", "classifier=frozen"], "add --set classifier=joint"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(preset: str, settings: list[str], says: str) -> None:
    with pytest.raises(UsageError) as error:
        configure(preset, settings)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("dabkowski-gal", ["masker.target_area=true", "mask_out.area_rule=conditional"]),
        ("fix", ["mask_out=kl-prior", "masker.target_area=true", "price.rule=fixed"]),
        ("ca", ["mask_out=kl-prior", "mask_out.frequencies=data", "mask_out.prior=divide"]),
        ("ca", ["population.size=3", "classifier=frozen", "population=none"]),
    ],
)
def test_the_same_setting_where_it_changes_something(preset: str, settings: list[str]) -> None:
    configure(preset, settings)


@pytest.mark.parametrize("setting", ["mask_out=kl-prior", "mask_in=classification", "price.rule=entropy"])
def test_fakes_are_for_hinges_at_a_fixed_price(setting: str) -> None:
    with pytest.raises(UsageError, match="only hinges at a fixed price"):
        configure("dabkowski-gal", [*(["price.initial=2"] if "rule" in setting else []), setting])


def test_a_method_needs_a_side() -> None:
    with pytest.raises(UsageError, match="neither"):
        configure("ca", ["mask_in=none", "mask_out=none"])


def test_a_description_is_plain() -> None:
    record = describe(configure("dabkowski-gal", ["masker.concrete.mode=soft"]))
    assert record["masker"]["concrete"] == {"mode": "soft"} and record["mask_out"]["margin"] == 5.0


def test_every_slot_of_the_grammar_is_documented() -> None:
    text = (Path(__file__).parents[2] / "pipeline" / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Every method is a preset")[2].partition("\n## ")[0]
    owners = (Preset, SideConfig, KLPriorConfig, ConcreteConfig, PopulationConfig, MaskerSpec)
    slots = {
        slot for owner in owners for slot in getattr(owner, "model_fields", None) or [f.name for f in fields(owner)]
    }
    slots -= {*FIXED, "side", "objective"}  # the name of a side's value says both
    missing = [slot for slot in sorted(slots) if not re.search(rf"(--|[`. ]){slot}[=. `]", table)]
    assert not missing, f"pipeline/README.md does not say how to set {', '.join(missing)}"


def test_the_papers_constants() -> None:
    """Paper section 3.3, whole."""
    fix, ca = PRESETS["paper-fix"], PRESETS["paper-ca"]
    for preset, weight in ((fix, 10.0), (ca, 15.0)):
        assert preset.mask_out == SideConfig(side="out", objective="entropy", lambda_area=weight, lambda_tv=0.001)
        assert preset.mask_in == SideConfig(side="in", objective="classification", lambda_area=1.0, lambda_tv=0.001)
        assert (preset.weight_in, preset.weight_out, preset.layers, preset.batch_size) == (1.0, 1.0, (3, 4), 72)
        assert preset.price.rule == "fixed" and preset.price.initial == 1.0 and not preset.relative_units
        rates = preset.optimisation
        assert (rates.masker_rate, rates.classifier_rate, rates.momentum, rates.weight_decay) == (1e-3, 1e-3, 0.9, 1e-4)
        assert (rates.classifier_method, rates.decay, rates.clip_norm) == ("sgd", "steps", 10.0)
    assert fix.classifier == "frozen" and fix.population is None
    assert ca.classifier == "joint" and ca.population == PopulationConfig(probability=0.5, save_every=100, size=30)

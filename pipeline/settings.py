"""``--set SLOT=VALUE``: another value for one slot of a preset, so that every variant is a preset and its differences."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.concrete import ConcreteConfig
from pipeline.errors import UsageError
from pipeline.fills import FILLS
from pipeline.objectives import KLPriorConfig, SideConfig
from pipeline.population import PopulationConfig
from pipeline.presets import PRESETS, SIDES, Preset

FIXED = ("name", "summary")
"""Slots that say what a preset is, and are not for setting."""
_Owner = TypeVar("_Owner")


def configure(preset: str, settings: Sequence[str]) -> Preset:
    """The preset called ``preset`` with every ``SLOT=VALUE`` of ``settings`` applied, from left to right.

    A slot inside another one is named with dots (``price.target=0.6``, ``masker.concrete.mode=hard``); a value is read
    as JSON where it is JSON, else as a string, and ``none`` empties a slot.  ``mask_in`` and ``mask_out`` take the names
    in `pipeline.presets.SIDES`.

    Raises:
        UsageError: no such preset or slot, or a value that the slot does not take.
    """
    if preset not in PRESETS:
        raise UsageError(f"preset {preset!r}: use {', '.join(PRESETS)}")
    result = PRESETS[preset]
    for setting in settings:
        path, found, text = setting.partition("=")
        if not found or not path:
            raise UsageError(f"--set {setting}: give SLOT=VALUE, such as fill=blur or price.target=0.6")
        result = _assign(result, path.split("."), _value(text), setting)
    if result.mask_in is None and result.mask_out is None:
        raise UsageError("--set: neither masked-in nor masked-out pictures are left to learn from; keep one of them")
    if not 0 <= result.fakes < 1:
        raise UsageError(f"--set fakes={result.fakes}: give a share of the pictures, at least 0 and less than 1")
    if result.fakes:
        _check_fakes(result)
    if result.masker.concrete is not None:
        try:
            ConcreteConfig(**result.masker.concrete)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--set masker.concrete: {error}; it takes mode and temperature") from error
    if result.masker.target_area and result.price.rule != "fixed":
        raise UsageError("--set masker.target_area=true: the wanted area sets the size, so add --set price.rule=fixed")
    if result.fill not in FILLS:
        raise UsageError(f"--set fill={result.fill}: use {', '.join(FILLS)}")
    _check_effect(result, settings)
    return result


def _check_effect(preset: Preset, settings: Sequence[str]) -> None:
    """Refuse slots that would change nothing: a run with one of them looks like a variant and is none."""
    sides = {"mask_in": preset.mask_in, "mask_out": preset.mask_out}
    if preset.masker.target_area and not any(_asks_area(side) for side in sides.values()):
        raise UsageError(
            "--set masker.target_area=true: neither side asks for the wanted area; add --set "
            "mask_out.area_rule=conditional, or give a side that is no kl-prior and has a lambda_area"
        )
    for name, side in sides.items():
        if isinstance(side, KLPriorConfig) and side.frequencies == "uniform":
            idle = ["prior=divide"] if side.prior == "divide" else []
            idle += ["class_weight=true"] if side.class_weight else []
            if idle:
                raise UsageError(
                    f"--set {name}.{idle[0]}: with every class alike it changes nothing; add --set "
                    f"{name}.frequencies=data, or leave it out"
                )
    named = [setting for setting in settings if re.match(r"population\b", setting)]
    if preset.classifier == "frozen" and preset.population is not None and named:
        raise UsageError(
            f"--set {named[-1]}: a frozen classifier has no earlier states; add --set classifier=joint, or leave it out"
        )


def _asks_area(side: SideConfig | KLPriorConfig | None) -> bool:
    return isinstance(side, SideConfig) and side.area_rule == "conditional" and side.lambda_area != 0


def _check_fakes(preset: Preset) -> None:
    where = f"--set fakes={preset.fakes}"
    if not preset.masker.class_conditional:
        raise UsageError(
            f"{where}: only a masker that is told a class can be told a wrong one; add "
            "--set masker.class_conditional=true, or fakes=0"
        )
    sides = [side for side in (preset.mask_in, preset.mask_out) if side is not None]
    if (
        any(isinstance(side, KLPriorConfig) or side.objective != "hinge" for side in sides)
        or preset.price.rule != "fixed"
    ):
        raise UsageError(
            f"{where}: only hinges at a fixed price know what to ask of a wrong class; take --preset "
            "dabkowski-gal, or fakes=0"
        )


def describe(preset: Preset) -> dict[str, Any]:
    """All slots as plain values, for a record."""
    return TypeAdapter(Preset).dump_python(preset, mode="json")


def _value(text: str) -> Any:
    if text == "none":
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _assign(owner: _Owner, path: list[str], value: Any, setting: str) -> _Owner:
    """``owner``, a configuration or a dictionary, with ``value`` at ``path``."""
    name, *rest = path
    if isinstance(owner, dict):
        return owner | {name: _assign(owner.get(name) or {}, rest, value, setting) if rest else value}  # pyright: ignore[reportReturnType]
    slots = [f.name for f in fields(owner)] if is_dataclass(owner) else list(type(owner).model_fields)  # pyright: ignore
    slots = [slot for slot in slots if slot not in FIXED]
    if name not in slots:
        raise UsageError(f"--set {setting}: no slot {name!r} there; there are {', '.join(slots)}")
    if rest:
        inner = getattr(owner, name)
        if inner is None:
            inner = PopulationConfig() if name == "population" else {}
        if not isinstance(inner, dict | BaseModel) and not is_dataclass(inner):
            raise UsageError(f"--set {setting}: {name} has no slots of its own; give {name}=VALUE")
        value = _assign(inner, rest, value, setting)
    elif name in SIDES and isinstance(value, str | None):
        names = SIDES[name]
        if (value or "none") not in names:
            raise UsageError(f"--set {setting}: use {', '.join(names)}")
        value = names[value or "none"]
    try:
        checked = TypeAdapter(get_type_hints(type(owner))[name]).validate_python(value)
        if isinstance(owner, BaseModel):
            return type(owner).model_validate(owner.model_dump() | {name: checked})  # pyright: ignore[reportReturnType]
        return replace(owner, **{name: checked})  # pyright: ignore[reportArgumentType, reportCallIssue]
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--set {setting}: {first['msg']}") from error
    except ValueError as error:
        raise UsageError(f"--set {setting}: {error}") from error

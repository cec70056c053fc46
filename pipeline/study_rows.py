"""The rows of the study: named variants, each a preset and its differences, and the row that it is compared with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.settings import configure, describe

HASH_LENGTH = 16
"""Hexadecimal digits of a definition's hash."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant."""

    name: str
    preset: str
    settings: tuple[str, ...] = ()
    """Differences from the preset (`pipeline.settings`)."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `pipeline.train`."""
    by_label: bool = False
    """Ask the masker for the evidence of the true class, where it is told one."""
    reference: str
    """The row that this one is compared with, seed by seed."""
    summary: str


CORE: tuple[Row, ...] = (
    Row(name="in-frozen", preset="fix", settings=("mask_out=none",), reference="both-frozen", summary="masked-in only"),
    Row(
        name="out-frozen", preset="fix", settings=("mask_in=none",), reference="both-frozen", summary="masked-out only"
    ),
    Row(name="both-frozen", preset="fix", reference="both-joint", summary="both, classifier frozen: preset fix"),
    Row(name="in-joint", preset="ca", settings=("mask_out=none",), reference="both-joint", summary="masked-in only"),
    Row(name="out-joint", preset="ca", settings=("mask_in=none",), reference="both-joint", summary="masked-out only"),
    Row(name="both-joint", preset="ca", reference="both-frozen", summary="both, classifier learns along: preset ca"),
)
"""Masked-in only, masked-out only and both, each with a frozen and with a joint classifier: the paper's two findings."""

OTHERS: tuple[Row, ...] = (
    Row(
        name="population-unused",
        preset="ca",
        settings=("population=none",),
        reference="both-joint",
        summary="the current classifier always judges",
    ),
    Row(
        name="population-inert",
        preset="ca",
        settings=("population.inert=true",),
        reference="both-joint",
        summary="as the published code does: drawn, never asked",
    ),
    Row(
        name="gumbel",
        preset="fix",
        settings=("masker.concrete.mode=hard", "masker.concrete.temperature=0.1"),
        reference="both-frozen",
        summary="hard binary-concrete masks",
    ),
    Row(
        name="fill-blur",
        preset="fix",
        settings=("fill=blur",),
        reference="both-frozen",
        summary="hidden pixels blurred",
    ),
    Row(
        name="fill-noise",
        preset="fix",
        settings=("fill=noise",),
        reference="both-frozen",
        summary="hidden pixels noise",
    ),
    Row(name="layers-4", preset="fix", settings=("layers=[4]",), reference="both-frozen", summary="deepest map only"),
    Row(
        name="layers-34", preset="fix", settings=("layers=[3,4]",), reference="both-frozen", summary="two deepest maps"
    ),
    Row(name="layers-all", preset="fix", settings=("layers=all",), reference="both-frozen", summary="all five maps"),
    Row(
        name="target-area",
        preset="fix",
        settings=("masker.target_area=true", "price.rule=fixed"),
        reference="both-frozen",
        summary="masker is told the area",
    ),
    Row(
        name="class-conditional",
        preset="fix",
        settings=("masker.class_conditional=true",),
        by_label=True,
        reference="both-frozen",
        summary="masker is told the class, and scored with the true one",
    ),
    *(
        Row(
            name=f"few-shot-{count}",
            preset="fix",
            arguments=("--per-class", str(count)),
            reference="both-frozen",
            summary=f"{count} training images of each class",
        )
        for count in (1, 5, 10, 50)
    ),
)

ROWS: dict[str, Row] = {row.name: row for row in (*CORE, *OTHERS)}


def choose_rows(text: str) -> list[Row]:
    """``core``, ``all``, or names separated by commas.

    Raises:
        UsageError: no such row.
    """
    chosen: list[Row] = []
    for name in text.split(","):
        if name in ("core", "all"):
            chosen += CORE if name == "core" else ROWS.values()
        elif name in ROWS:
            chosen.append(ROWS[name])
        else:
            raise UsageError(f"--rows {name}: use core, all, or some of {', '.join(ROWS)}")
    return list(dict.fromkeys(chosen))


def definition_of(row: Row, seed: int, shared: Sequence[str]) -> str:
    """A short hash of all that a trial of ``row`` is trained by: what its preset means now, its arguments, and the seed.

    ``shared``: the arguments of every row, the length of the trainings among them.
    """
    known = {
        "preset": describe(configure(row.preset, row.settings)),
        "arguments": [*shared, *row.arguments],
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH]

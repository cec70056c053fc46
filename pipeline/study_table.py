"""The study as one table: mean and interval over seeds, and the paired difference from the row of reference."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pipeline.pages import render
from pipeline.study_rows import ROWS

LEVEL = 0.95
CAM = "LE of CAM"
"""Class activation maps of the classifier that the run ended with."""
FIGURES = ("LE", "OM", "F1", "PxAP", "MaxBoxAccV2", "mask_mean", "top1")
LENGTHS = ("--steps", "--budget")
PLACES = ("--data", "--weights", "--class-map", "--class-names")
"""Arguments that name a folder or a file, which may lie elsewhere on another machine."""
Setup = frozenset[tuple[str, str]]
CHANGES = (
    "top1_before", "top1_after", "agreement", "loss_barrier", "agreement_snapshots", "loss_barrier_snapshots",
)  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % t-interval; with one value the ends are nan."""
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return mean, mean - half, mean + half


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per variant and setup, in the order of `ROWS`.

    Runs of other lengths, data, classifiers or weights are neither averaged together nor compared.
    """
    groups: dict[tuple[str, Setup], dict[int, dict[str, Any]]] = {}
    for record in (record for record in records if record["row"] in ROWS):
        groups.setdefault((record["row"], setup_of(record)), {})[record["seed"]] = record
    setups = list(dict.fromkeys(setup for _, setup in groups))
    table = []
    for name, setup in ((name, setup) for name in ROWS for setup in setups if (name, setup) in groups):
        row, runs = ROWS[name], groups[name, setup]
        line: dict[str, Any] = {"row": name, "summary": row.summary, "reference": row.reference, "seeds": len(runs)}
        line["runs"] = list(runs.values())
        for figure in FIGURES:
            values = [run["metrics"][figure] for run in runs.values() if run["metrics"].get(figure) is not None]
            line[figure] = interval(values) if values else None
        changes = [run["classifier"] for run in runs.values() if "classifier" in run]
        for change in CHANGES:
            values = [run[change] for run in changes if change in run]
            line[change] = interval(values) if values else None
        values = [run["cam"] for run in runs.values() if run.get("cam") is not None]
        line[CAM] = interval(values) if values else None
        line["length"] = ", ".join([length_of(line["runs"]), *_differing(setup, setups)])
        others = groups.get((row.reference, setup), {})
        both = sorted(runs.keys() & others.keys())
        both = [s for s in both if None not in (runs[s]["metrics"]["LE"], others[s]["metrics"]["LE"])]  # boxes or none
        differences = [runs[seed]["metrics"]["LE"] - others[seed]["metrics"]["LE"] for seed in both]
        line["LE_difference"] = interval(differences) if differences else None
        line["pairs"] = len(both)
        table.append(line)
    return table


def setup_of(record: dict[str, Any]) -> Setup:
    """The arguments that a run shares with the other rows of its study, by name; folders and files by their own name."""
    given: dict[str, list[str]] = {}
    flag = ""
    for text in record["config"]["arguments"]:
        if text.startswith("--"):
            flag, found, value = text.partition("=")
            given.setdefault(flag, []).extend([value] if found else [])
        else:
            given.setdefault(flag, []).append(text)
    own = {text.partition("=")[0] for text in ROWS[record["row"]].arguments if text.startswith("--")}
    return frozenset(
        (flag, " ".join(Path(value).name if flag in PLACES else value for value in values))
        for flag, values in given.items()
        if flag not in own
    )


def _differing(setup: Setup, setups: Sequence[Setup]) -> list[str]:
    """The arguments of ``setup``, beside the length, that are not those of all ``setups``."""
    everywhere = frozenset.intersection(*setups)
    return [f"{flag} {value}".strip() for flag, value in sorted(setup - everywhere) if flag not in LENGTHS]


def length_of(runs: Sequence[dict[str, Any]]) -> str:
    """How long runs of one setup were: as their command said, and the steps that they took in the time that it gave them."""
    given = dict(setup_of(runs[0]))
    if "--steps" in given:
        return f"{given['--steps']} steps"
    taken = sorted(run["steps"] for run in runs if "steps" in run)
    steps = "" if not taken else f"{taken[0]} steps" if taken[0] == taken[-1] else f"{taken[0]} to {taken[-1]} steps"
    return ", ".join(part for part in (given.get("--budget", ""), steps) if part)


def findings(table: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows say of the paper's two findings, each as a sentence; none where a row is missing."""
    asked = {
        f"{side}-{kind}": (f"both sides instead of masked-{side} only, {kind} classifier", f"both-{kind}", -1)
        for kind in ("frozen", "joint")
        for side in ("in", "out")
    }
    asked["both-joint"] = ("training the classifier along instead of freezing it", "both-frozen", 1)
    said = []
    for name, (what, reference, sign) in asked.items():
        lines = [line for line in table if line["row"] == name and line["reference"] == reference]
        for line in lines:
            if line["LE_difference"] is not None:
                said.append(_sentence(f"{what}, {line['length']}" if len(lines) > 1 else what, line, sign=sign))
    return said


def _sentence(what: str, line: dict[str, Any], *, sign: int) -> str:
    mean, low, high = line["LE_difference"]
    mean, low, high = (mean, low, high) if sign > 0 else (-mean, -high, -low)
    if not np.isfinite(low):
        verdict = "one seed, so nothing can be said of chance"
    elif high < 0:
        verdict = "holds: the whole interval is below 0"
    elif low > 0:
        verdict = "does not hold: the whole interval is above 0"
    else:
        verdict = "not decided: the interval holds 0"
    ends = f" (95 % interval {100 * low:+.1f} to {100 * high:+.1f})" if np.isfinite(low) else ""
    return f"{what}: LE changes by {100 * mean:+.1f} points{ends}, {line['pairs']} seeds; {verdict}."


def write_study(records: Sequence[dict[str, Any]], out: Path, *, title: str) -> None:
    """Write ``out/study.csv``, ``study.md`` and ``study.html``."""
    table = summarise(records)
    with (out / "study.csv").open("w", newline="", encoding="utf-8") as file:
        columns = [*FIGURES, CAM, *CHANGES, "LE_difference"]
        writer = csv.writer(file)
        ends = [f"{name}{end}" for name in columns for end in ("", "_low", "_high")]
        writer.writerow(["row", "reference", "seeds", "length", "pairs", *ends])
        for line in table:
            cells = [value for name in columns for value in (line[name] or (None, None, None))]
            writer.writerow([line["row"], line["reference"], line["seeds"], line["length"], line["pairs"], *cells])
    (out / "study.md").write_text(markdown(table, title), encoding="utf-8")
    shown = render(
        "study.html",
        filters={"cell": cell},
        title=title,
        table=table,
        figures=(*FIGURES, CAM),
        changes=CHANGES,
        findings=findings(table),
        plot=plot(table),
    )
    (out / "study.html").write_text(shown, encoding="utf-8")


def cell(value: tuple[float, float, float] | None) -> str:
    """Per cent with half the width of the interval."""
    if value is None:
        return "-"
    mean, low, high = value
    return f"{100 * mean:.1f}" + (f" ± {100 * (high - low) / 2:.1f}" if np.isfinite(low) else "")


def markdown(table: Sequence[dict[str, Any]], title: str) -> str:
    """The table and what it says of the findings."""
    names = [*FIGURES, "LE_difference", CAM, *CHANGES]
    lines = [
        f"# {title}",
        "",
        "Per cent (loss_barrier in hundredths of a nat), mean ± half of the 95 % t-interval over seeds.",
        "",
    ]
    lines.append("| row | what | length | seeds | " + " | ".join(names) + " | reference |")
    lines.append("|" + "---|" * (len(names) + 5))
    for line in table:
        cells = " | ".join(cell(line[name]) for name in names)
        lines.append(
            f"| {line['row']} | {line['summary']} | {line['length']} | {line['seeds']} | {cells} | {line['reference']} |"
        )
    return "\n".join([*lines, "", *(f"* {text}" for text in findings(table)), ""])


def plot(table: Sequence[dict[str, Any]]) -> str:
    """LE and mean mask of every run and the intervals of every row, as a PNG in a data URI."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.42 * len(table) + 1.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("LE", "mask_mean"), strict=True):
        for place, line in enumerate(table):
            values = [100 * run["metrics"][name] for run in line["runs"] if run["metrics"][name] is not None]
            if not values or line[name] is None:
                continue
            mean, low, high = (100 * value for value in line[name])
            axes.plot(values, [place] * len(values), "o", color="0.6", markersize=4)
            if np.isfinite(low):
                axes.plot([low, high], [place, place], "-", color="#0072b2")
            axes.plot([mean], [place], "D", color="#0072b2", markersize=5)
        axes.set_xlabel(f"{name}, per cent")
        axes.grid(axis="x", color="0.9")
    panels[0].set_yticks(range(len(table)), [line["row"] for line in table])
    panels[0].invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

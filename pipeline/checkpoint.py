"""What a checkpoint holds, so that a run that goes on from it takes the same steps as an undisturbed one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.area_price import Price
from pipeline.model import SaliencyModel
from pipeline.population import Population
from pipeline.snapshots import Snapshots
from pipeline.step import JointStep
from pipeline.step_log import StepLog


def save(
    folder: Path,
    row: dict[str, Any],
    log: StepLog,
    model: SaliencyModel,
    step_of: JointStep,
    population: Population | None,
    snapshots: Snapshots | None,
) -> None:
    """Write ``state.pt`` and ``log.csv`` after the step of ``row``; ``log``: of all steps.

    ``snapshots``: where the population's snapshots lie; none: in the checkpoint itself.
    """
    if population is not None and snapshots is not None:
        snapshots.keep(population.state())
    state = {
        "step": row["step"],
        "seconds": row.get("seconds", 0.0),
        "price": asdict(step_of.price),
        "model": model.state_dict(),
        "classifier_optimiser": step_of.classifier_optimiser.state_dict(),
        "masker_optimiser": step_of.masker_optimiser.state_dict(),
        "snapshots": list(population.state()) if population else [],
        "population": list(population.state().values()) if population and snapshots is None else [],
    }
    torch.save(state, folder / "state.pt")
    log.write(folder / "log.csv")


def restore(
    folder: Path,
    model: SaliencyModel,
    step_of: JointStep,
    population: Population | None,
    snapshots: Snapshots | None,
    log: StepLog,
) -> tuple[int, float]:
    """Take what `save` wrote; returns the number of steps and the seconds that they took.

    Raises:
        WorkError: a snapshot that the checkpoint names cannot be read.
    """
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    step_of.classifier_optimiser.load_state_dict(state["classifier_optimiser"])
    step_of.masker_optimiser.load_state_dict(state["masker_optimiser"])
    step_of.price = Price(**state["price"])
    if population is not None:
        numbers, inside = state["snapshots"], state["population"]
        if snapshots is not None:
            inside = [snapshots.read(taken) for taken in numbers]
            snapshots.resumed(numbers)
        population.restore(dict(zip(numbers, inside, strict=True)))
    log.read(folder / "log.csv")
    return state["step"], state["seconds"]

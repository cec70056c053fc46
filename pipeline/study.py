"""The paper's comparison of variants as one table: ``python -m pipeline.study --data DIR --out DIR``.

Every row is trained with every seed as a trial of Ray Tune, as many at once as the machine holds.  A finished trial is a
file of under 1 KB in ``OUT/records``; running the command again does only what is missing, and goes on in the middle of
a trial that was cut off.  The table is written anew after each command, from all records that are there.

The six core rows with 3 seeds of 100 seconds each take about 40 minutes on 2 CPU cores with MobileNetV2 at 224 pixels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.allocator import keep_freed_memory
from pipeline.cli import Parser, run
from pipeline.errors import UsageError, WorkError

if TYPE_CHECKING:
    from pipeline.study_rows import Row

RETRIES = 2
"""How often a trial whose process died is begun again."""
EVERY = 10
"""Steps between two signs of life of a trial."""


def parser() -> Parser:
    """The command line."""
    p = Parser(
        "pipeline.study",
        "Train and judge a grid of variants x seeds as Ray Tune trials. Every other argument is passed to each training: "
        "see 'python -m pipeline.train --help'.",
    )
    p.add_argument("--data", required=True, metavar="DIR", help="image folder with train/ and val/")
    p.add_argument("--out", required=True, metavar="DIR", help="local folder of the study; running it again resumes")
    p.add_argument("--rows", default="core", help="core, all, or names separated by commas (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0..N-1 (default: %(default)s)")
    p.add_argument("--budget", default="5m", metavar="TIME", help="length of each training (default: %(default)s)")
    p.add_argument("--steps", type=int, metavar="N", help="length of each training in steps, instead of --budget")
    p.add_argument(
        "--cpus-per-trial", type=int, metavar="N", help="CPUs of a trial (default: all that there are, 4 at most)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and write the table.

    Raises:
        UsageError: an argument of this command or of the trainings is wrong.
        WorkError: a trial failed; the table holds the others.
    """
    arguments, further = parser().parse_known_args(argv)
    keep_freed_memory()
    from pipeline.study_rows import choose_rows
    from pipeline.study_table import findings, summarise, write_study

    if arguments.seeds < 1:
        raise UsageError(f"--seeds {arguments.seeds}: give a number of at least 1")
    reserved = sorted({"--preset", "--seed", "--per-class", "--set"} & {text.partition("=")[0] for text in further})
    if reserved:
        raise UsageError(f"{reserved[0]}: the rows of the study set it themselves; leave it out")
    rows = choose_rows(arguments.rows)
    length = ["--steps", str(arguments.steps)] if arguments.steps else ["--budget", arguments.budget]
    shared = ["--data", arguments.data, *length, *further]
    out = Path(arguments.out).resolve()
    records = out / "records"
    try:
        records.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error.strerror}); give a local folder") from error
    todo = missing(rows, range(arguments.seeds), records, shared)
    _check(rows, shared)
    failed = run_trials(todo, shared, out, arguments.cpus_per_trial) if todo else []
    found = read_records(records)
    if found:
        write_study(found, out, title=f"Study of {Path(arguments.data).resolve().name}")
        for text in findings(summarise(found)):
            print(text)
        print(f"table: {out / 'study.html'}")
    if failed:
        raise WorkError(f"{len(failed)} trials failed, the first one {failed[0]}; the same command tries them again")


def missing(rows: Sequence[Row], seeds: Sequence[int], records: Path, shared: list[str]) -> list[tuple[Row, int]]:
    """The cells of the grid without a record, seed by seed, so that every row gets its first seed first.

    Raises:
        UsageError: a record was made with other arguments, or by another definition of its row.
    """
    from pipeline.study_rows import definition_of

    todo = []
    for seed in seeds:
        for row in rows:
            path = records / f"{row.name}-{seed}.json"
            if not path.is_file():
                todo.append((row, seed))
                continue
            record = json.loads(path.read_text(encoding="utf-8"))
            theirs, known = record["config"], record.get("definition")  # which records of earlier releases lack
            if theirs["arguments"] != [*shared, *row.arguments]:
                raise UsageError(
                    f"{path} was made with '{' '.join(theirs['arguments'])}'; give another --out, or the same arguments "
                    "to go on"
                )
            redefined = (theirs["preset"], tuple(theirs["settings"])) != (row.preset, row.settings)
            if redefined or known not in (None, definition_of(row, seed, shared)):
                raise UsageError(
                    f"{path} was made when the row {row.name} was preset {theirs['preset']} with "
                    f"{' '.join(theirs['settings']) or 'no setting'}{'' if redefined else ' and other constants'}; move it "
                    "away, or give another --out"
                )
    return todo


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def _check(rows: Sequence[Row], shared: list[str]) -> None:
    """Say what is wrong with the arguments of the trainings before a trial starts."""
    from pipeline.planning import plan_training
    from pipeline.train import parser as training_parser

    for preset in dict.fromkeys(row.preset for row in rows):
        plan_training(training_parser().parse_args([*shared, "--preset", preset, "--out", "unused"]))


def run_trials(todo: Sequence[tuple[Row, int]], shared: list[str], out: Path, cpus: int | None) -> list[str]:
    """Run the cells ``todo`` as Ray Tune trials; returns the names of those that failed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths in the arguments mean what they mean here
    import ray
    from ray import tune
    from tqdm import tqdm

    from pipeline.ray_training import join_cluster, quiet

    quiet()
    if not ray.is_initialized():
        join_cluster()
    resources = ray.cluster_resources()
    threads = cpus or max(1, min(4, int(resources.get("CPU", 1))))
    need: dict[str, float] = {"cpu": threads, "gpu": min(1.0, resources.get("GPU", 0.0))}
    names = {f"{row.name}-{seed}": (row, seed) for row, seed in todo}

    class Bar(tune.Callback):
        """One step of the bar for each trial that ends."""

        def __init__(self) -> None:
            self.bar = tqdm(total=len(names), desc="study", unit="trial")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.bar.set_postfix_str(trial.config["cell"])
            self.bar.update()

    def trial(config: dict[str, Any]) -> None:
        from pipeline.study_trial import run_trial

        row, seed = names[config["cell"]]

        def tell(progress: dict[str, Any]) -> None:
            if progress["step"] % EVERY == 0:
                tune.report({"course": progress["course"]})

        work = out / "work" / config["cell"]
        record = run_trial(row, seed, shared, folder=work, threads=threads, tell=tell)
        partial = out / "records" / f".{config['cell']}"
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        partial.replace(out / "records" / f"{config['cell']}.json")
        tune.report({"course": 1.0})

    tuner = tune.Tuner(
        tune.with_resources(trial, need),
        param_space={"cell": tune.grid_search(list(names))},
        tune_config=tune.TuneConfig(metric="course", mode="max"),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(out),
            callbacks=[Bar()],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            verbose=0,
        ),
    )
    results = tuner.fit()
    done = {path.stem for path in (out / "records").glob("*.json")}
    for result in results:
        if result.error is not None and result.config is not None:
            print(f"{result.config['cell']}: {result.error}")
    return [name for name in names if name not in done]


if __name__ == "__main__":
    run(main, "pipeline.study")

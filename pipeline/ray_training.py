"""The training loop on Ray Train: starting workers, checkpoints in the run's storage, and what comes out at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.validation_config import ValidationConfig, ValidationTaskConfig

from pipeline import failures
from pipeline.board import Board
from pipeline.checkpoint_index import mend_index
from pipeline.data import store
from pipeline.errors import UsageError, WorkError
from pipeline.placement import machines, place
from pipeline.reservation import Reservation
from pipeline.run_folder import claim_run, keep_weights, open_storage, publish, upload, weights_here
from pipeline.time_left import TimeLeft
from pipeline.tracking import Server, Tracking, chosen_server
from pipeline.training import TrainingPlan
from pipeline.validation import LEAST, LOWER_IS_BETTER, SCORE, forget, judged, record_of, validate
from pipeline.weights import is_weight_file

STORAGE_NAME = "checkpoints"
PATIENCE = 3600.0
"""Seconds after which a validation without a record counts as failed."""
LEAVE_SECONDS = 20.0
"""How long an interrupted command may take to end by itself."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell gives it."""
UNREAD = -1
"""In place of the step of a checkpoint that could not be read."""
RESTARTS = 100
"""Worker failures that a run survives; each costs at most the steps since the last checkpoint."""


class RayReporter:
    """Carries progress and checkpoints of a worker to Ray Train."""

    def __init__(
        self, plan: TrainingPlan, run: str, *, first_course: float, first_step: int, server: Server | None
    ) -> None:
        """``server``: of MLflow, where figures also go."""
        self.run: str | None = run
        self.bar = self.board = self.tracking = None
        self.asked: tuple[int, float] | None = None
        if ray.train.get_context().get_world_rank() == 0:
            from ray.experimental import tqdm_ray

            self.board = Board(run, "train", first_step=first_step)
            self.tracking = Tracking(server, run, plan.in_words()) if server is not None else None
            self.bar = tqdm_ray.tqdm(total=100, desc=f"train {plan.preset}", unit="%")
            self.bar.update(int(first_course * 100))
        self.shown = int(first_course * 100)
        self.left = TimeLeft()

    def progress(self, row: dict[str, Any]) -> None:
        """Move the bar, and write TensorBoard's events."""
        for board in (self.board, self.tracking):
            if board is not None:
                board.add(row["step"], {f"train/{name}": value for name, value in row.items() if name != "step"})
        left = self.left.words(row["course"])
        done = min(int(row["course"] * 100), 100)
        if self.bar is not None and done > self.shown:
            figures = [f"top-1 {row['clean_right']:.2f}"]
            named = {"mask": "mask_mean", "in": "in_right", "hidden": "hidden"}
            figures += [f"{name} {row[key]:.2f}" for name, key in named.items() if key in row]
            figures += [left] if left else []
            self.bar.set_description(f"train {row['phase']} step {row['step']}: {', '.join(figures)}")
            self.bar.update(done - self.shown)
            self.shown = done

    def leaving(self) -> bool:
        """Whether Ray knows that a machine of this run is about to be taken away (spot instances); a barrier."""
        notice = getattr(ray.train, "get_preemption_info", None)  # new in Ray 2.56
        return notice is not None and notice() is not None

    def ready(self) -> bool:
        """Whether the validation that was asked for last has ended, so that they do not pile up."""
        if self.asked is None or time.monotonic() - self.asked[1] > PATIENCE:
            return True
        return store.exists(record_of(str(self.run), self.asked[0]))

    def checkpoint(
        self, write: Callable[[Path], None], row: dict[str, Any], *, final: bool, validate: bool = False
    ) -> None:
        """Report the row to Ray Train with the checkpoint that rank 0 writes; a barrier for all workers."""
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)} | {SCORE: LEAST}
        if validate:
            self.asked = (row["step"], time.monotonic())
            if ray.train.get_context().get_world_rank() == 0:
                # Of the same step before a restart: it would say that this validation has ended.
                forget(str(self.run), row["step"])
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if ray.train.get_context().get_world_rank() == 0:
                write(Path(folder))
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(
                numbers | {"final": int(final)}, checkpoint=checkpoint, validation=validate and checkpoint is not None
            )
        for board in (self.board, self.tracking):
            if board is not None:
                board.close() if final else board.flush()
        if final and self.bar is not None:
            self.bar.close()


def worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import torch

    from pipeline import training

    quiet()
    run = config["run"]
    server = Server(**config["mlflow"]) if config["mlflow"] is not None else None
    plan = TrainingPlan.of({name: value for name, value in config.items() if name not in ("run", "mlflow")})
    device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
    checkpoint = ray.train.get_checkpoint()
    with contextlib.ExitStack() as stack:
        done, first = 0.0, 0
        try:
            folder = Path(stack.enter_context(checkpoint.as_directory())) if checkpoint else None
            if folder is not None:
                first = UNREAD
                if failures.lasting(run, first):
                    return
                state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)
                first = state["step"]
                done = max(state["step"] / plan.steps, state["seconds"] / plan.budget if plan.budget else 0.0)
                if done >= 1 and (folder / "bundle").is_dir():
                    return
            if failures.lasting(run, first):
                return
            reporter = RayReporter(plan, run, first_course=done, first_step=first, server=server)
            training.train(plan, reporter, resume=folder, device=device)
        except Exception as error:
            failures.record(run, ray.train.get_context().get_world_rank(), first, error)
            raise


def fit(
    plan: TrainingPlan,
    *,
    out: str,
    workers: int | tuple[int, int],
    gpu: str,
    cpus_per_worker: int | None = None,
    validation_images: int = 500,
    select: str | None = None,
) -> str:
    """Train ``plan`` in the run folder ``out`` (a path or URI); returns where the bundle is.

    ``cpus_per_worker``: CPUs of each; none: as many as let all workers fit on the machines that are there now.
    ``validation_images``: pictures of ``val`` for each validation.  ``select``: the figure by which the bundle is
    chosen among the validated checkpoints; none: the last one.

    Raises:
        UsageError: ``out`` holds another run, or cannot be written.
        WorkError: the workers failed.
    """
    quiet()
    if "://" not in out:
        out = str(Path(out).resolve())  # workers have working directories of their own
    filesystem, root = open_storage(out)
    with contextlib.ExitStack() as stack:
        weights, known_as = None, plan.weights
        if plan.weights is not None and is_weight_file(plan.weights):
            weights, known_as = stack.enter_context(weights_here(plan.weights))
        claim_run(filesystem, root, plan.fields() | {"weights": known_as})
        with answering_store(out):
            if weights is not None and known_as is not None:
                plan = replace(plan, weights=keep_weights(weights, known_as, filesystem, root, out))
            mended = mend_index(filesystem, f"{root}/{STORAGE_NAME}", lambda step: judged(out, step, select))
            failures.forget(out)
    if mended is not None:
        print(mended, flush=True)
    if not ray.is_initialized():
        join_cluster()
    resources = ray.cluster_resources()
    use_gpu = gpu == "yes" or (gpu == "auto" and resources.get("GPU", 0) >= 1)
    most = workers if isinstance(workers, int) else workers[1]
    least = workers if isinstance(workers, int) else workers[0]
    # A cluster that was joined may still grow; one of this command's own is this machine.
    may_grow = cpus_per_worker is not None and gpu != "auto" and not own_cluster()
    found = None if may_grow else machines()
    cpus = place(found, (least, most), gpu=use_gpu, cpus=cpus_per_worker)
    server = chosen_server()
    fields = plan.fields() | {"threads": cpus, "run": out, "mlflow": asdict(server) if server is not None else None}
    spare = int(resources.get("CPU", 1)) - most * cpus
    validation = ValidationConfig(
        fn=validate,  # pyright: ignore[reportArgumentType]  it gets the arguments below and no others
        task_config=ValidationTaskConfig(
            fn_kwargs={
                "run": out,
                "data": plan.data,
                "images": validation_images,
                "threads": max(1, spare),
                "select": select,
            }
        ),
        # Where the workers have taken every CPU, a validation shares theirs instead of waiting for ever.
        ray_remote_kwargs={"num_cpus": min(1, max(0, spare)), "max_retries": 2},
    )

    trainer = TorchTrainer(
        worker,
        train_loop_config=fields,
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {})
        ),
        run_config=RunConfig(
            name=STORAGE_NAME,
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=RESTARTS),
            callbacks=[Reservation(out)],  # pyright: ignore[reportArgumentType]  Ray takes its own kind, too
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=SCORE if select else None),
        ),
        validation_config=validation,
    )
    try:
        result = run_to_end(trainer)
    except Exception as error:
        raise WorkError(
            f"training failed: {root_cause(error)}; the same command goes on from the last checkpoint"
        ) from error
    failure = failures.lasting(out, UNREAD)
    if failure is not None and result.checkpoint is not None:
        raise WorkError(
            f"the last checkpoint of {out} cannot be read ({failure.error}); delete {result.checkpoint.path}, and the same "
            "command goes on from the one before it"
        )
    failure = failures.lasting(out, last_step(result))
    if failure is not None:
        raise WorkError(
            f"training in {out} failed {failure.count} times after step {failure.step}: {failure.error}; mend it, and the "
            "same command goes on from there"
        )
    if result.checkpoint is None:
        raise WorkError(f"training in {out} ended without a checkpoint; see the workers' messages above")
    with answering_store(out):
        with result.checkpoint.as_directory() as folder:
            upload(Path(folder) / "log.csv", filesystem, f"{root}/log.csv")
        chosen = result.checkpoint if select is None else best_of(result.best_checkpoints or [], select, out)
        with chosen.as_directory() as folder:
            if not (Path(folder) / "bundle").is_dir():
                raise WorkError(f"the last checkpoint in {out} holds no bundle; run the same command again")
            publish(Path(folder), plan, filesystem, root)
    return f"{out.rstrip('/')}/bundle"


@contextlib.contextmanager
def answering_store(out: str) -> Iterator[None]:
    """Where the run's storage is read or written.

    Raises:
        WorkError: it does not answer.
    """
    try:
        yield
    except OSError as error:
        raise WorkError(
            f"--out {out}: the storage failed ({' '.join(str(error).split())[:200]}); the same command goes on from the last checkpoint"
        ) from error


def run_to_end(trainer: TorchTrainer) -> ray.train.Result:
    """``trainer.fit()``, which Ctrl-C interrupts as it does any program: in a thread, for in the main one Ray takes the signal
    for itself and ends the process with a status that says nothing.  The last checkpoint is in the run's storage.

    Python joins threads before it ends, and one of Ray's may wait for ever: then the process ends without them.
    """
    outcome: Future[ray.train.Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        last_resort = threading.Timer(LEAVE_SECONDS, leave)
        last_resort.daemon = True
        last_resort.start()
        raise


def own_cluster() -> Any:
    """The head node that this process started; none in a cluster that it joined."""
    from ray._private import worker as ray_worker

    node = ray_worker._global_node
    return node if node is not None and node.is_head() else None


def leave() -> None:
    """End the process at once, and with it the cluster that it started: its workers would train on without anybody."""
    try:
        node = own_cluster()
        if node is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
    finally:
        os._exit(INTERRUPTED)


def last_step(result: ray.train.Result) -> int:
    """The step of the last checkpoint; 0 before the first."""
    return int((result.metrics or {}).get("step", 0)) if result.checkpoint is not None else 0


def best_of(found: Sequence[tuple[Checkpoint, dict[str, Any]]], select: str, out: str) -> Checkpoint:
    """The validated checkpoint with the best figure ``select``.

    Raises:
        WorkError: none has it.
    """
    judged = [(figures[select], checkpoint) for checkpoint, figures in found if figures.get(select) is not None]
    if not judged:
        raise WorkError(f"no checkpoint in {out} has a figure {select}; see the validations' messages above")
    better = min if select in LOWER_IS_BETTER else max
    value, checkpoint = better(judged, key=lambda pair: pair[0])
    print(f"chosen by {select}: {value:.4f}")
    return checkpoint


def join_cluster() -> None:
    """Join the cluster of ``$RAY_ADDRESS``, else one that runs on this machine, else start one for this process.

    Raises:
        UsageError: the cluster that is there does not answer, or refuses.
    """
    try:
        ray.init(include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise UsageError(
            f"{' '.join(str(error).split())[:200]}; set RAY_ADDRESS=local for a cluster of this command's own, or "
            "RAY_ADDRESS and RAY_AUTH_TOKEN_PATH for the one that you mean"
        ) from error


def quiet() -> None:
    """Keep Ray's running commentary off the screen; warnings and errors stay."""
    for name in ("ray", "ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.WARNING)


def root_cause(error: BaseException) -> str:
    """The innermost error's own words, on one line."""
    while (inner := error.__cause__ or getattr(error, "cause", None)) is not None and inner is not error:
        error = inner
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"

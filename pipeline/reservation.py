"""The places of an elastic run, freed when its driver was killed.

Ray keeps the places that a run asked for until they expire, three minutes after their driver was last heard of.  The same command
run again is another run to Ray, and would wait for the places of the one before it.  So each run notes its name in its folder,
and the next one gives the places of that name back.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ray.train.v2._internal.execution.callback import ControllerCallback

from pipeline.data import store
from pipeline.errors import UsageError, WorkError

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.context import TrainRunContext

NAME_FILE = "ray_run"
SECONDS = 10.0
"""How long Ray may take to give the places back."""


class Reservation(ControllerCallback):
    """Runs in Ray Train's controller, which knows under which name it asks for places."""

    def __init__(self, run: str) -> None:
        """``run``: the run's folder or URI."""
        self.place = store.join(store.place_of(run), NAME_FILE)

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Give back what the run before this one holds, and note this one's name."""
        import ray
        import ray.exceptions

        try:
            # Ray's own room: another release may keep it elsewhere, and a run does not fail for that.
            from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
                get_or_create_autoscaling_coordinator,
            )

            before = store.read_optional(self.place)
            if before:
                name = f"train-{before.decode()}"
                coordinator = get_or_create_autoscaling_coordinator()
                ray.get(coordinator.cancel_request.remote(requester_id=name), timeout=SECONDS)
            store.write_bytes(self.place, train_run_context.run_id.encode())
        except (
            ImportError,
            AttributeError,
            UsageError,
            WorkError,
            store.ReadError,
            ray.exceptions.RayError,
        ) as error:  # then Ray's three minutes pass
            print(f"the places of the run before this one are not given back yet: {error}", file=sys.stderr)

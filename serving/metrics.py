"""What Prometheus is told: each replica counts for itself, and whichever is asked answers for all, by label ``replica``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from pipeline.mask_statistics import mask_statistics

CONTENT_TYPE = CONTENT_TYPE_LATEST
Snapshot = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_SHARES = tuple(k / 20 for k in range(1, 21))
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of one replica."""

    def __init__(self, *, replica: str) -> None:
        self.registry = CollectorRegistry()
        self._replica = replica

        def labelled(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **options: Any) -> Any:
            made = kind(f"onepass_{name}", text, ("replica", *labels), registry=self.registry, **options)
            return _Bound(made, replica) if labels else made.labels(replica)

        self.requests = labelled(Counter, "requests", "Requests by route and status", ("route", "status"))
        self.request_seconds = labelled(Histogram, "request_seconds", "Time of a request", ("route",), buckets=_SECONDS)
        self.errors = labelled(Counter, "errors", "Images and requests refused, by kind", ("kind",))
        self.images = labelled(Counter, "images", "Images scored")
        self.queue = labelled(Gauge, "queue_images", "Images under way or waiting")
        self.batch_sizes = labelled(Histogram, "batch_size", "Images in one call of the engine", buckets=_SIZES)
        self.stage_seconds = labelled(
            Histogram, "stage_seconds", "Time of one decode, batch or finish", ("stage",), buckets=_SECONDS
        )
        self._masks = {
            name: labelled(Histogram, f"mask_{name}", f"Mask statistic {name} of scored images", buckets=_SHARES)
            for name in ("area", "entropy", "off_centre")
        }
        self._reference = labelled(
            Gauge, "mask_reference", "Mask statistics of the training images, for drift", ("statistic", "figure")
        )
        self._engine = labelled(Gauge, "engine_info", "The engine that is loaded", ("sha256", "kind", "provider"))

    def set_engine(self, *, sha256: str, kind: str, provider: str) -> None:
        """Name the engine that is loaded."""
        self._engine.labels(sha256, kind, provider).set(1)

    def set_reference(self, statistics: dict[str, Any]) -> None:
        """Publish the mask statistics that the bundle was trained with (`pipeline.mask_statistics.summarise`)."""
        for name, figures in statistics.items():
            for figure in ("mean", "std"):
                if isinstance(figures, dict) and figure in figures:
                    self._reference.labels(name, figure).set(figures[figure])

    def watch_mask(self, mask: np.ndarray) -> None:
        """Count a mask (h, w) in [0, 1] for explanation drift."""
        for name, values in mask_statistics(mask[None]).items():
            self._masks[name].observe(float(values[0]))

    def snapshot(self) -> Snapshot:
        """All values, as something that another process can take."""
        return [
            (
                family.name,
                family.documentation,
                family.type,
                [(s.name, dict(s.labels), s.value) for s in family.samples],
            )
            for family in self.registry.collect()
        ]


def text(snapshots: Iterable[Snapshot]) -> bytes:
    """Values of several replicas in Prometheus' text format."""
    families: dict[str, Metric] = {}
    for snapshot in snapshots:
        for name, documentation, kind, samples in snapshot:
            family = families.setdefault(name, Metric(name, documentation, kind))
            for sample, labels, value in samples:
                family.add_sample(sample, labels, value)
    registry = CollectorRegistry()
    registry.register(_Collected(list(families.values())))
    return generate_latest(registry)


class _Collected:
    """Values that were collected elsewhere."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class _Bound:
    """A metric whose first label is set already."""

    def __init__(self, metric: Any, replica: str) -> None:
        self._metric, self._replica = metric, replica

    def labels(self, *values: object) -> Any:
        return self._metric.labels(self._replica, *values)

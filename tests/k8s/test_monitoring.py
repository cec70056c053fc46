"""Alerts and dashboard speak of metrics that exist, and monitors of ports that are declared."""

from __future__ import annotations

import json
import re

from pipeline.mask_statistics import mask_statistics
from serving.metrics import Metrics
from tests.k8s._manifests import K8S, Object, find, pods

REPOSITORY = K8S.parent
# Of Ray itself and of kube-state-metrics; the former are looked up in the installed Ray.
FROM_RAY = {
    "ray_node_gpus_utilization": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_cpu_utilization": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_mem_used": "dashboard/modules/reporter/reporter_agent.py",
    "ray_train_report_total_blocked_time_s": "train/v2/_internal/metrics/worker.py",
}
OTHERS = {"up", "kube_pod_status_phase"}


def expressions(objects: list[Object]) -> list[str]:
    rules = find(objects, "PrometheusRule", "onepass")["spec"]["groups"]
    board = json.loads(find(objects, "ConfigMap", "onepass-dashboard")["data"]["onepass.json"])
    targets = [target for panel in board["panels"] for target in panel.get("targets", [])]
    return [rule["expr"] for group in rules for rule in group["rules"]] + [target["expr"] for target in targets]


def names(expression: str) -> set[str]:
    bare = re.sub(r'"[^"]*"|\{\{[^}]*\}\}', "", expression)
    return set(re.findall(r"\b(?:ray_(?!io_)|onepass_|kube_)\w+|\bup\b", bare))


def test_metrics_exist(overlays: dict[str, list[Object]]) -> None:
    metrics = Metrics(replica="r")
    known = set(OTHERS)
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        known |= {family.name + suffix for suffix in suffixes}
    source = "".join(path.read_text() for path in (REPOSITORY / "serving").glob("*.py"))
    known |= {f"ray_{name}_total" for name in re.findall(r'Counter\(\s*"(onepass_\w+)"', source)}
    import ray

    package = REPOSITORY / next(iter(ray.__path__))
    for name, file in FROM_RAY.items():
        assert f'"{name.removeprefix("ray_")}"' in (package / file).read_text(), name
        known.add(name)
    for expression in expressions(overlays["gpu"]):
        assert names(expression) and names(expression) <= known, expression


def test_drift_is_told_by_the_statistics_that_bundles_keep(overlays: dict[str, list[Object]]) -> None:
    import numpy as np

    text = " ".join(expressions(overlays["gpu"]))
    kept = set(mask_statistics(np.zeros((1, 4, 4))))
    assert set(re.findall(r"onepass_mask_(area|entropy|off_centre)_sum", text)) == kept
    assert set(re.findall(r'statistic="(\w+)"', text)) <= kept


def test_monitors_name_declared_ports(overlays: dict[str, list[Object]]) -> None:
    objects = overlays["gpu"]
    for o in objects:
        if o["kind"] != "PodMonitor":
            continue
        wanted = o["spec"]["selector"]["matchLabels"].items()
        chosen = [pod for pod in pods(objects) if wanted <= pod.labels.items()]
        assert chosen
        declared = {port["name"] for pod in chosen for port in pod.spec["containers"][0]["ports"]}
        assert {endpoint["port"] for endpoint in o["spec"]["podMetricsEndpoints"]} <= declared


def test_alerts_cover_what_operators_ask_for(overlays: dict[str, list[Object]]) -> None:
    groups = find(overlays["gpu"], "PrometheusRule", "onepass")["spec"]["groups"]
    alerts = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    wanted = {"OnepassBatchStuck", "OnepassTrainingStuck", "OnepassErrorRowsRising", "OnepassExplanationDrift"}
    assert wanted | {"OnepassGpuIdle"} <= alerts.keys()
    readme = (K8S / "README.md").read_text()
    for name, alert in alerts.items():
        assert {"summary", "description"} <= alert["annotations"].keys()
        assert name in readme, f"{name}: k8s/README.md does not say what to do"

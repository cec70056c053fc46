"""Alerts and dashboard speak of metrics that exist, and monitors of ports that are declared."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.mask_statistics import mask_statistics
from serving.metrics import Metrics
from tests.k8s._manifests import K8S, Object, clusters, find, need, pods

REPOSITORY = K8S.parent
CASES = Path(__file__).with_name("alerts.yaml")
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


def alerts(objects: list[Object]) -> dict[str, Any]:
    groups = find(objects, "PrometheusRule", "onepass")["spec"]["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


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
    prefix = re.search(r'Gauge\(f"(onepass_\w+)\{name\}"', source)
    assert prefix
    known |= {f"ray_{prefix[1]}{name}" for name in re.findall(r'gauge\("(\w+)"', source)}
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
    found = alerts(overlays["gpu"])
    wanted = {"OnepassBatchStuck", "OnepassTrainingStuck", "OnepassErrorRowsRising", "OnepassExplanationDrift"}
    assert wanted | {"OnepassGpuIdle"} <= found.keys()
    readme = (K8S / "README.md").read_text()
    for name, alert in found.items():
        assert {"summary", "description"} <= alert["annotations"].keys()
        assert name in readme, f"{name}: k8s/README.md does not say what to do"


@pytest.mark.parametrize(("alert", "component"), [("OnepassBatchStuck", "batch"), ("OnepassTrainingStuck", "train")])
def test_a_hang_before_the_first_sample_is_told(alert: str, component: str, overlays: dict[str, list[Object]]) -> None:
    """A job that never wrote anything has no series: the alert starts from the pods that are up, workers alone.

    They have to have been up for as long as progress is looked for, or each job would alarm while it begins.
    """
    expression = alerts(overlays["gpu"])[alert]["expr"]
    up, _, progress = expression.partition(" unless on (ray_io_cluster) ")
    count = r'count by \(ray_io_cluster\) \(up\{component="(\w+)", container="([\w-]+)"\}'
    match = re.fullmatch(rf"{count} == 1\) > 0 and on \(ray_io_cluster\) {count} offset (\w+) == 1\) > 0", up)
    assert match and progress.endswith("> 0")
    assert match[1] == match[3] == component and match[2] == match[4] and f"[{match[5]}]" in progress
    workers = [
        p for p in pods(overlays["gpu"]) if p.role == "worker" and p.labels["app.kubernetes.io/component"] == component
    ]
    assert {pod.spec["containers"][0]["name"] for pod in workers} == {match[2]}


def test_finished_jobs_do_not_alarm(overlays: dict[str, list[Object]]) -> None:
    """Their clusters stay for a while, idle; no alert on jobs is so quick."""
    units = {"s": 1, "m": 60, "h": 3600}
    stays = max(spec.get("ttlSecondsAfterFinished", 0) for _, spec, _ in clusters(overlays["gpu"]))
    waits = alerts(overlays["gpu"])
    for name in ("OnepassGpuIdle", "OnepassBatchStuck", "OnepassTrainingStuck"):
        windows = [waits[name]["for"], *re.findall(r"\[(\w+)\]", waits[name]["expr"])]
        assert sum(int(window[:-1]) * units[window[-1]] for window in windows) > stays, name


def test_replicas_are_counted_once(overlays: dict[str, list[Object]]) -> None:
    """Each pod's answer speaks for every replica, so figures are made one for each replica before they are added up."""
    for expression in expressions(overlays["gpu"]):
        for name in re.findall(r"(?<!\w)onepass_\w+", expression):
            once = rf"max without \(pod, instance\) \((?:rate\(|increase\()?{name}\b|max\({name}\b"
            assert len(re.findall(once, expression)) == len(re.findall(rf"(?<!\w){name}\b", expression)), name


def test_every_alert_is_tried_both_ways(overlays: dict[str, list[Object]]) -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    for fires in (True, False):
        tried = {case["alertname"] for case in cases if bool(case["exp_alerts"]) == fires}
        assert tried == alerts(overlays["gpu"]).keys()


def test_alerts_fire_when_they_should(overlays: dict[str, list[Object]], tmp_path: Path) -> None:
    """Prometheus' own rule tests, on series as jobs leave them."""
    promtool = need("promtool", "prometheus")
    rules = find(overlays["gpu"], "PrometheusRule", "onepass")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "alerts.yaml").write_text(CASES.read_text())
    done = subprocess.run(
        [promtool, "test", "rules", "alerts.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_do_not_overlap(overlays: dict[str, list[Object]]) -> None:
    board = json.loads(find(overlays["gpu"], "ConfigMap", "onepass-dashboard")["data"]["onepass.json"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)

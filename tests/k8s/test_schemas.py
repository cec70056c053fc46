"""Every object fits the schema of its kind, with no field that the schema does not know."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s._manifests import K8S, Object, find, mixed

RAY_KINDS = {
    "RayJob": "rayjobs", "RayService": "rayservices", "RayCronJob": "raycronjobs", "RayCluster": "rayclusters"
}  # fmt: skip
KUBERNETES = "1.33"
LABELLED = {
    "type": "object",
    "required": ["name", "namespace"],
    "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": {"type": "object"}},
    "additionalProperties": False,
}


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT, STRINGS = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
RELABELLING = closed({"sourceLabels": {"type": "array", "items": TEXT}, "targetLabel": TEXT}, "targetLabel")
ENDPOINT = closed(
    {
        "port": TEXT,
        "path": TEXT,
        "relabelings": {"type": "array", "items": RELABELLING},
        "authorization": closed({"credentials": closed({"name": TEXT, "key": TEXT}, "name", "key")}, "credentials"),
    },
    "port",
)
ALERT = closed(
    {"alert": TEXT, "expr": TEXT, "for": TEXT, "labels": STRINGS, "annotations": STRINGS},
    "alert",
    "expr",
    "for",
    "labels",
    "annotations",
)
MONITORING = "monitoring.coreos.com/v1"
FOREIGN_KINDS = {
    # The fields that are used here, as the Prometheus Operator's and Kueue's references describe them: against misspelt ones.
    "LocalQueue": ("kueue.x-k8s.io/v1beta2", closed({"clusterQueue": TEXT}, "clusterQueue")),
    "PodMonitor": (
        MONITORING,
        closed(
            {"selector": closed({"matchLabels": STRINGS}), "podMetricsEndpoints": {"type": "array", "items": ENDPOINT}},
            "selector",
            "podMetricsEndpoints",
        ),
    ),
    "PrometheusRule": (
        MONITORING,
        closed(
            {
                "groups": {
                    "type": "array",
                    "items": closed({"name": TEXT, "rules": {"type": "array", "items": ALERT}}, "name", "rules"),
                }
            },
            "groups",
        ),
    ),
}


def strict(schema: Any) -> Any:
    """A structural schema of a custom resource, made to refuse unknown fields, as the API server's strict mode does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


@pytest.fixture(scope="session")
def ray_schemas(shared_dir: Path) -> dict[str, jsonschema.Draft7Validator]:
    """Validators of KubeRay's kinds in version v1."""
    validators = {}
    for kind, plural in RAY_KINDS.items():
        text = (shared_dir / "schemas/kuberay" / f"ray.io_{plural}.yaml").read_bytes()
        definition = yaml.load(text, Loader=yaml.CSafeLoader)
        version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        validators[kind] = jsonschema.Draft7Validator(schema)
    return validators


def errors(o: Object, ray_schemas: dict[str, jsonschema.Draft7Validator]) -> list[str]:
    if o["kind"] in RAY_KINDS:
        assert o["apiVersion"] == "ray.io/v1"
        return [f"{e.json_path}: {e.message[:200]}" for e in ray_schemas[o["kind"]].iter_errors(o)]
    if o["kind"] in FOREIGN_KINDS:
        version, spec = FOREIGN_KINDS[o["kind"]]
        schema = closed({"apiVersion": {"const": version}, "kind": TEXT, "metadata": LABELLED, "spec": spec}, "spec")
        return [f"{e.json_path}: {e.message[:200]}" for e in jsonschema.Draft7Validator(schema).iter_errors(o)]
    try:
        kubernetes_validate.validate(o, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error.message)[:200]]
    return []


def test_objects_fit_their_schemas(
    overlays: dict[str, list[Object]], ray_schemas: dict[str, jsonschema.Draft7Validator], tmp_path: Path
) -> None:
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    own = mixed(tmp_path, "spot", "s3-keys", "kueue", "pod-identity")
    for name, objects in (overlays | {"a user's": own}).items():
        for o in objects:
            text = json.dumps(o, sort_keys=True)
            if text not in seen:  # most objects are the same in several overlays
                seen.add(text)
                if bad := errors(o, ray_schemas):
                    found[f"{name} {o['kind']}/{o['metadata']['name']}"] = bad
    assert found == {}
    kinds = {o["kind"] for objects in overlays.values() for o in objects}
    assert kinds >= {"RayJob", "RayService", "RayCronJob", "Job", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor"}
    assert "LocalQueue" in {o["kind"] for o in own}


def test_the_cluster_made_by_hand_is_one(
    overlays: dict[str, list[Object]], ray_schemas: dict[str, jsonschema.Draft7Validator]
) -> None:
    """The README's program makes the training's own cluster of the overlay, and its line is the training's own."""
    readme = (K8S / "README.md").read_text()
    (program,) = re.findall(r"\| python -c '\n(.*?)' \| kubectl apply -f -", readme, re.DOTALL)
    objects = overlays["gpu"]
    made = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        input=yaml.safe_dump_all(objects), capture_output=True, text=True, check=True,
    )  # fmt: skip
    cluster, job = yaml.safe_load(made.stdout), find(objects, "RayJob", "train")
    assert cluster["kind"] == "RayCluster" and errors(cluster, ray_schemas) == []
    assert cluster["metadata"] == job["metadata"] | {"name": "train-by-hand"}
    assert cluster["spec"] == job["spec"]["rayClusterSpec"] and cluster["spec"]["authOptions"] == {"mode": "token"}
    assert all(name in readme for name in ("service/train-by-hand-head-svc 8265", "get secret train-by-hand "))
    (line,) = re.findall(r"ray job submit --address \S+ --\s+(python [^\n]*)", readme.replace("\\\n", " "))
    assert shlex.split(line.replace("<bucket>", "onepass")) == shlex.split(job["spec"]["entrypoint"])


def test_objects_have_names_of_their_own(objects: list[Object]) -> None:
    names = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("RayJob", "train", ["spec", "shutdownAfterJobFinished"], True),
        ("RayJob", "train", ["spec", "backoffLimit"], "3"),
        ("RayJob", "batch", ["spec", "rayClusterSpec", "authOptions", "mode"], "on"),
        ("RayService", "serve", ["spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "conainers"], []),
        ("RayCronJob", "batch-nightly", ["spec", "schedule"], None),
        ("Job", "export", ["spec", "backofLimit"], 1),
        ("NetworkPolicy", "dns", ["spec", "egresses"], []),
        ("PodMonitor", "onepass-ray", ["spec", "podMetricsEndpoint"], []),
    ],
)
def test_a_misspelt_field_is_refused(
    kind: str,
    name: str,
    path: list[str],
    value: object,
    overlays: dict[str, list[Object]],
    ray_schemas: dict[str, jsonschema.Draft7Validator],
) -> None:
    o = copy.deepcopy(find(overlays["gpu"], kind, name))
    place = o
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert errors(o, ray_schemas)


def test_suspended_jobs_fit(
    overlays: dict[str, list[Object]], ray_schemas: dict[str, jsonschema.Draft7Validator]
) -> None:
    """What Kueue, or an operator's hand, does to a job."""
    for name in ("train", "batch"):
        job = copy.deepcopy(find(overlays["gpu"], "RayJob", name))
        job["spec"]["suspend"] = True
        assert errors(job, ray_schemas) == []
        # KubeRay refuses to suspend a job that would leave its cluster behind, or that runs on somebody else's.
        assert job["spec"]["shutdownAfterJobFinishes"] is True
        assert "clusterSelector" not in job["spec"]

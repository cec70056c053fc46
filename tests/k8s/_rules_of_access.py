"""Rules on who gets in: tokens, secrets, keys, services, images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from tests.k8s._manifests import COMPONENT, Object, Pod, clusters, pods
from tests.k8s._rules import containers, rule


@rule("ray-token")
def ray_token(objects: list[Object]) -> Iterator[str]:
    for where, _, cluster in clusters(objects):
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield where
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            for container in group["template"]["spec"]["containers"]:
                if any(env["name"].startswith("RAY_AUTH") for env in container.get("env", [])):
                    yield f"{where} overrides the token"


@rule("api-token")
def api_token(objects: list[Object]) -> Iterator[str]:
    for pod in pods(objects):
        if pod.labels.get(COMPONENT) == "serve":
            environment = {e["name"]: e for e in pod.spec["containers"][0].get("env", [])}
            if "secretKeyRef" not in environment.get("ONEPASS_API_TOKEN", {}).get("valueFrom", {}):
                yield pod.where


@rule("inside-only")
def inside_only(objects: list[Object]) -> Iterator[str]:
    for o in objects:
        if o["kind"] in ("Ingress", "Gateway", "HTTPRoute"):
            yield f"{o['kind']}/{o['metadata']['name']}"
        if o["kind"] == "Service" and o["spec"].get("type") != "ClusterIP":
            yield f"Service/{o['metadata']['name']}"
    for where, spec, cluster in clusters(objects):
        head = cluster["headGroupSpec"]
        if head.get("serviceType") != "ClusterIP" or head.get("enableIngress") or "headService" in head:
            yield where
        if "serveService" in spec:
            yield f"{where} has a service of its own"


@rule("secrets-by-reference")
def secrets_by_reference(objects: list[Object]) -> Iterator[str]:
    for o in objects:
        if o["kind"] == "Secret":
            yield f"Secret/{o['metadata']['name']}"
    for _, where, container in containers(objects):
        for env in container.get("env", []):
            if re.search(r"TOKEN|PASSWORD|SECRET|KEY", env["name"]) and "secretKeyRef" not in env.get("valueFrom", {}):
                yield f"{where} {env['name']}"
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                yield f"{where} takes its environment from a ConfigMap"
    for where, spec, cluster in clusters(objects):
        password = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword")
        if password is not None and "secretKeyRef" not in password.get("valueFrom", {}):
            yield f"{where} redisPassword"
        text = json.dumps([spec.get("entrypoint"), spec.get("serveConfigV2"), spec.get("runtimeEnvYAML")])
        if re.search(r"(token|password|secret|access_key)\w*\s*[=:]", text, re.IGNORECASE):
            yield f"{where} writes a secret down"


def stores(pod: Pod) -> bool:
    """Whether the pod reads or writes object storage."""
    return pod.role in ("head", "worker", "job") and pod.labels[COMPONENT] != "data"


def has_keys(container: Object) -> bool:
    return any("secretRef" in source for source in container.get("envFrom", []))


@rule("storage-keys")
def storage_keys(objects: list[Object]) -> Iterator[str]:
    """Static keys are with every container that moves data, or with none, and then pods have cloud roles."""
    found = {
        f"{pod.where} {container['name']}": has_keys(container)
        for pod in pods(objects)
        if stores(pod)
        for container in (pod.spec["initContainers"][0], pod.spec["containers"][0])
    }
    if any(found.values()):
        yield from (where for where, keys in found.items() if not keys)


@rule("images-pinned")
def images_pinned(objects: list[Object]) -> Iterator[str]:
    ours = set()
    for pod, where, container in containers(objects):
        image = container["image"]
        name, _, tag = image.partition("@")[0].rpartition(":")
        if "@sha256:" not in image and (not name or "/" in tag or tag in ("", "latest")):
            yield f"{where} {image}"
        if pod.ours:
            ours.add(image)
    if len(ours) != 1:
        yield f"more than one image: {sorted(ours)}"


@rule("versions-agree")
def versions_agree(objects: list[Object]) -> Iterator[str]:
    for where, _, cluster in clusters(objects):
        if cluster.get("rayVersion") != "2.60.0":
            yield where

"""The manifests as kubectl builds them, and the pods that come of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).resolve().parents[2] / "k8s"
OVERLAYS = ("local", "gpu", "spot", "s3")
NAMESPACE = "onepass"
COMPONENT = "app.kubernetes.io/component"
ROLE = "onepass-saliency/role"
ISTIO_DEFAULTS = K8S / "components/gateway/istio-defaults.yaml"
GATEWAY_CLASS = "gateway.istio.io/defaults-for-class"
STEP_BY_STEP = "NewClusterWithIncrementalUpgrade"

Object = dict[str, Any]


def need(program: str, package: str) -> str:
    """The path of ``program``; without it the test is skipped by name, and fails in CI."""
    path = shutil.which(program)
    if path is None:
        message = f"needs {program} (Debian: apt-get install {package})"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def build(folder: Path) -> list[Object]:
    """The objects that ``kubectl apply -k folder`` would send, and those that k8s/README.md has applied beside them."""
    kubectl = need("kubectl", "kubernetes-client, where it is 1.27 or later")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"kubectl kustomize {folder}: {done.stderr}"
    assert not done.stderr, f"kubectl kustomize {folder} warns: {done.stderr}"
    objects = [document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document]
    if any(spec.get("upgradeStrategy", {}).get("type") == STEP_BY_STEP for _, spec, _ in clusters(objects)):
        objects.append(yaml.safe_load(ISTIO_DEFAULTS.read_text()))
    return objects


def mixed(folder: Path, overlay: str, *components: str) -> list[Object]:
    """An overlay of a user's own, written to ``folder``: one of ours with further components."""
    relative = os.path.relpath(K8S, folder)
    pieces = ", ".join(f"{relative}/components/{name}" for name in components)
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{relative}/overlays/{overlay}]\ncomponents: [{pieces}]\n"
    )
    return build(folder)


def find(objects: list[Object], kind: str, name: str) -> Object:
    return next(o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)


@dataclass(frozen=True)
class Pod:
    """A pod that some object makes."""

    where: str
    role: str
    """head, worker, submit, job or redis."""
    labels: dict[str, str]
    """With those that KubeRay adds."""
    spec: Object
    cluster: Object = field(default_factory=dict)
    """The Ray cluster that it belongs to, if any."""
    group: Object = field(default_factory=dict)
    """The group of the cluster."""

    @property
    def containers(self) -> list[Object]:
        """All containers, with the autoscaler that KubeRay puts beside the head of an elastic cluster."""
        found = [*self.spec.get("initContainers", []), *self.spec["containers"]]
        if self.role == "head" and self.cluster.get("enableInTreeAutoscaling"):
            options = self.cluster.get("autoscalerOptions", {})
            kept = {key: options[key] for key in ("resources", "securityContext", "volumeMounts") if key in options}
            found.append({"name": "autoscaler", "image": self.spec["containers"][0]["image"], **kept})
        return found

    @property
    def ours(self) -> bool:
        """Whether it runs the project's image."""
        return self.role != "redis"


def clusters(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """(where, specification of the job or service, specification of its Ray cluster)."""
    for o in objects:
        where = f"{o['kind']}/{o['metadata']['name']}"
        if o["kind"] == "RayJob":
            yield where, o["spec"], o["spec"]["rayClusterSpec"]
        elif o["kind"] == "RayCronJob":
            yield where, o["spec"]["jobTemplate"], o["spec"]["jobTemplate"]["rayClusterSpec"]
        elif o["kind"] == "RayService":
            yield where, o["spec"], o["spec"]["rayClusterConfig"]


def pods(objects: list[Object]) -> Iterator[Pod]:
    for where, spec, cluster in clusters(objects):
        if "submitterPodTemplate" in spec:
            template = spec["submitterPodTemplate"]
            yield Pod(f"{where} submitter", "submit", _labels(template), template["spec"])
        for role, group in [("head", cluster["headGroupSpec"]), *(("worker", g) for g in cluster["workerGroupSpecs"])]:
            added = {"ray.io/is-ray-node": "yes", "ray.io/node-type": role}
            template = group["template"]
            name = f"{where} {group.get('groupName', role)}"
            yield Pod(name, role, _labels(template) | added, template["spec"], cluster, group)
    for o in objects:
        if o["kind"] in ("Job", "StatefulSet", "Deployment", "DaemonSet"):
            template = o["spec"]["template"]
            labels = _labels(template)
            role = "redis" if labels.get("app.kubernetes.io/name") == "redis" else "job"
            yield Pod(f"{o['kind']}/{o['metadata']['name']}", role, labels, template["spec"])


def _labels(template: Object) -> dict[str, str]:
    return dict(template["metadata"].get("labels", {}))


_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1}


def size(quantity: str | int) -> int:
    """Bytes of a Kubernetes quantity such as 2Gi."""
    text = str(quantity)
    number = text.rstrip("KMGTi")
    return int(number) * _UNITS[text[len(number) :]]

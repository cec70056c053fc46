"""Each security rule holds for every overlay, and each is broken by a manifest that somebody might write."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.k8s._manifests import K8S, Object, build, find
from tests.k8s._policy import RULES, broken


def test_rules_hold(objects: list[Object]) -> None:
    assert broken(objects) == {}


Change = Callable[[list[Object]], Any]


def head(objects: list[Object], name: str = "train") -> Object:
    return find(objects, "RayJob", name)["spec"]["rayClusterSpec"]["headGroupSpec"]


def cluster(objects: list[Object], name: str = "train") -> Object:
    return find(objects, "RayJob", name)["spec"]["rayClusterSpec"]


def pod(objects: list[Object], name: str = "train") -> Object:
    return cluster(objects, name)["workerGroupSpecs"][0]["template"]["spec"]


def first(objects: list[Object], name: str = "train") -> Object:
    return pod(objects, name)["containers"][0]


def policy(objects: list[Object], name: str) -> Object:
    return find(objects, "NetworkPolicy", name)["spec"]


def service(objects: list[Object]) -> Object:
    return find(objects, "RayService", "serve")["spec"]


def without(objects: list[Object], kind: str, name: str) -> None:
    objects.remove(find(objects, kind, name))


MUTATIONS: dict[str, tuple[str, Change]] = {
    "namespace without pod security": (
        "namespace-restricted",
        lambda o: find(o, "Namespace", "onepass")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"),
    ),
    "worker as root": ("non-root", lambda o: pod(o)["securityContext"].update(runAsUser=0)),
    "container as root": ("non-root", lambda o: first(o)["securityContext"].update(runAsUser=0)),
    "submitter may be root": (
        "non-root",
        lambda o: find(o, "RayJob", "batch")["spec"]["submitterPodTemplate"]["spec"]["securityContext"].pop(
            "runAsNonRoot"
        ),
    ),
    "unconfined seccomp": (
        "seccomp",
        lambda o: first(o)["securityContext"].update(seccompProfile={"type": "Unconfined"}),
    ),
    "no seccomp": ("seccomp", lambda o: pod(o, "batch")["securityContext"].pop("seccompProfile")),
    "privileged": ("no-privileges", lambda o: first(o)["securityContext"].update(privileged=True)),
    "may gain privileges": (
        "no-privileges",
        lambda o: find(o, "StatefulSet", "onepass-redis")["spec"]["template"]["spec"]["containers"][0][
            "securityContext"
        ].pop("allowPrivilegeEscalation"),
    ),
    "capability to trace": (
        "no-capabilities",
        lambda o: first(o)["securityContext"].update(capabilities={"drop": ["ALL"], "add": ["SYS_PTRACE"]}),
    ),
    "autoscaler keeps capabilities": (
        "no-capabilities",
        lambda o: cluster(o)["autoscalerOptions"]["securityContext"].pop("capabilities"),
    ),
    "writable root": ("read-only-root", lambda o: first(o)["securityContext"].pop("readOnlyRootFilesystem")),
    "host network": ("no-host", lambda o: pod(o).update(hostNetwork=True)),
    "host path": ("no-host", lambda o: pod(o)["volumes"].append({"name": "docker", "hostPath": {"path": "/var/run"}})),
    "token of the cluster": ("no-cluster-token", lambda o: pod(o).pop("automountServiceAccountToken")),
    "default account": ("no-cluster-token", lambda o: pod(o, "batch").pop("serviceAccountName")),
    "head reads the autoscaler's token": (
        "no-cluster-token",
        lambda o: head(o)["template"]["spec"]["containers"][0]["volumeMounts"].append(
            {"name": "autoscaler-token", "mountPath": "/token"}
        ),
    ),
    "memory overcommitted": ("memory-guaranteed", lambda o: first(o)["resources"]["requests"].update(memory="1Gi")),
    "init container without limit": (
        "memory-guaranteed",
        lambda o: pod(o)["initContainers"][0]["resources"].pop("limits"),
    ),
    "unsized /dev/shm": (
        "shared-memory",
        lambda o: next(v for v in pod(o)["volumes"] if v["name"] == "shared-mem").update(
            emptyDir={"sizeLimit": "10Gi"}
        ),
    ),
    "object store beyond /dev/shm": (
        "shared-memory",
        lambda o: head(o)["rayStartParams"].update({"object-store-memory": "3000000000"}),
    ),
    "disk without bound": (
        "disk-bounded",
        lambda o: next(v for v in pod(o)["volumes"] if v["name"] == "tmp").update(emptyDir={}),
    ),
    "jobs API without token": ("ray-token", lambda o: cluster(o, "batch").pop("authOptions")),
    "token auth disabled": ("ray-token", lambda o: cluster(o)["authOptions"].update(mode="disabled")),
    "service without token": (
        "api-token",
        lambda o: service(o)["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0].pop("env"),
    ),
    "dashboard on a load balancer": ("inside-only", lambda o: head(o).update(serviceType="LoadBalancer")),
    "ingress": ("inside-only", lambda o: head(o).update(enableIngress=True)),
    "Redis on a node port": (
        "inside-only",
        lambda o: find(o, "Service", "onepass-redis")["spec"].update(type="NodePort"),
    ),
    "key written down": (
        "secrets-by-reference",
        lambda o: first(o).update(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]),
    ),
    "password of Redis written down": (
        "secrets-by-reference",
        lambda o: service(o)["rayClusterConfig"]["gcsFaultToleranceOptions"].update(redisPassword={"value": "x"}),
    ),
    "secret in the manifests": (
        "secrets-by-reference",
        lambda o: o.append(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "onepass"}, "data": {}}
        ),
    ),
    "latest image": ("images-pinned", lambda o: first(o).update(image="onepass-saliency:latest")),
    "image without tag": ("images-pinned", lambda o: first(o).update(image="onepass-saliency")),
    "another Ray": ("versions-agree", lambda o: cluster(o).update(rayVersion="2.50.0")),
    "cluster outlives its job": (
        "jobs-end",
        lambda o: find(o, "RayJob", "train")["spec"].update(shutdownAfterJobFinishes=False),
    ),
    "no retry": ("jobs-end", lambda o: find(o, "RayJob", "batch")["spec"].update(backoffLimit=0)),
    "waits for nodes for ever": (
        "jobs-end",
        lambda o: find(o, "RayJob", "train")["spec"].pop("preRunningDeadlineSeconds"),
    ),
    "range of workers differs": ("elastic-range", lambda o: cluster(o)["workerGroupSpecs"][0].update(maxReplicas=16)),
    "range without autoscaler": ("elastic-range", lambda o: cluster(o).pop("enableInTreeAutoscaling")),
    "range of replicas differs": (
        "elastic-range",
        lambda o: service(o)["rayClusterConfig"]["workerGroupSpecs"][0].update(minReplicas=1),
    ),
    "work on the head": ("gpus-on-workers", lambda o: head(o)["rayStartParams"].pop("num-cpus")),
    "engine from another GPU": (
        "one-kind-of-gpu",
        lambda o: find(o, "Job", "export")["spec"]["template"]["spec"].update(
            nodeSelector={"nvidia.com/gpu.product": "NVIDIA-T4"}
        ),
    ),
    "service forgets with its head": (
        "survives-its-head",
        lambda o: service(o)["rayClusterConfig"].pop("gcsFaultToleranceOptions"),
    ),
    "budget of no effect": (
        "disruption-budget",
        lambda o: find(o, "PodDisruptionBudget", "serve-head").update(
            spec={"maxUnavailable": 1, "selector": {"matchLabels": {"ray.io/node-type": "head"}}}
        ),
    ),
    "budget missing": ("disruption-budget", lambda o: without(o, "PodDisruptionBudget", "serve-workers")),
    "no default deny": ("network", lambda o: without(o, "NetworkPolicy", "default-deny")),
    "no DNS": ("network", lambda o: without(o, "NetworkPolicy", "dns")),
    "dashboard open to all": ("network", lambda o: policy(o, "dashboard-from-operator")["ingress"][0].pop("from")),
    "metadata service reachable": (
        "network",
        lambda o: policy(o, "object-storage")["egress"][0]["to"][0]["ipBlock"]["except"].remove("169.254.0.0/16"),
    ),
    "any port outwards": ("network", lambda o: policy(o, "object-storage")["egress"][0].pop("ports")),
    "clusters see each other": (
        "network",
        lambda o: [
            rules[0].update({end: [{"podSelector": {}}]})
            for name in ("ray-train", "ray-batch")
            for rules, end in ((policy(o, name)["ingress"], "from"), (policy(o, name)["egress"], "to"))
        ],
    ),
    "Redis open to workers": (
        "network",
        lambda o: [
            policy(o, "redis")["ingress"][0]["from"][0].pop("matchExpressions", None),
            policy(o, "redis")["ingress"][0]["from"][0]["podSelector"].pop("matchExpressions"),
            policy(o, "serve-to-redis")["podSelector"].pop("matchExpressions"),
        ],
    ),
    "no storage": ("network", lambda o: without(o, "NetworkPolicy", "object-storage")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_manifest_is_caught(name: str, overlays: dict[str, list[Object]]) -> None:
    wanted, mutate = MUTATIONS[name]
    objects = copy.deepcopy(overlays["gpu"])
    mutate(objects)
    assert set(broken(objects)) == {wanted}


def test_every_rule_has_a_mutation() -> None:
    assert {rule for rule, _ in MUTATIONS.values()} == RULES.keys()


def test_kueue_component_keeps_the_rules(tmp_path: Path) -> None:
    relative = os.path.relpath(K8S, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{relative}/overlays/gpu]\ncomponents: [{relative}/components/kueue]\n"
    )
    objects = build(tmp_path)
    assert broken(objects) == {}
    for name in ("train", "batch"):
        job = find(objects, "RayJob", name)
        assert job["spec"]["suspend"] is True
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "onepass"
        assert not job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling")

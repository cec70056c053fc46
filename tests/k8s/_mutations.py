"""Manifests that somebody might write, each with the rule that has to catch it.

``python -m tests.k8s._mutations`` tries them and prints the table "mutated manifest -> rule that caught it".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.k8s._manifests import K8S, Object, build, find
from tests.k8s._policy import broken

Change = Callable[[list[Object]], Any]


@dataclass(frozen=True)
class Mutation:
    """A change for the worse to the built objects of an overlay."""

    rule: str
    """The rule that has to catch it, and no other."""
    change: Change
    overlay: str = "gpu"


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


def nightly(objects: list[Object]) -> Object:
    return find(objects, "RayCronJob", "batch-nightly")["spec"]["jobTemplate"]["rayClusterSpec"]


def reword(job: Object, old: str, new: str) -> None:
    assert old in job["entrypoint"]
    job["entrypoint"] = job["entrypoint"].replace(old, new)


MUTATIONS: dict[str, Mutation] = {
    "namespace without pod security": Mutation(
        "namespace-restricted",
        lambda o: find(o, "Namespace", "onepass")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"),
    ),
    "worker as root": Mutation("non-root", lambda o: pod(o)["securityContext"].update(runAsUser=0)),
    "container as root": Mutation("non-root", lambda o: first(o)["securityContext"].update(runAsUser=0)),
    "submitter may be root": Mutation(
        "non-root",
        lambda o: find(o, "RayJob", "batch")["spec"]["submitterPodTemplate"]["spec"]["securityContext"].pop(
            "runAsNonRoot"
        ),
    ),
    "unconfined seccomp": Mutation(
        "seccomp",
        lambda o: first(o)["securityContext"].update(seccompProfile={"type": "Unconfined"}),
    ),
    "no seccomp": Mutation("seccomp", lambda o: pod(o, "batch")["securityContext"].pop("seccompProfile")),
    "privileged": Mutation("no-privileges", lambda o: first(o)["securityContext"].update(privileged=True)),
    "may gain privileges": Mutation(
        "no-privileges",
        lambda o: find(o, "StatefulSet", "onepass-redis")["spec"]["template"]["spec"]["containers"][0][
            "securityContext"
        ].pop("allowPrivilegeEscalation"),
    ),
    "capability to trace": Mutation(
        "no-capabilities",
        lambda o: first(o)["securityContext"].update(capabilities={"drop": ["ALL"], "add": ["SYS_PTRACE"]}),
    ),
    "autoscaler keeps capabilities": Mutation(
        "no-capabilities",
        lambda o: cluster(o)["autoscalerOptions"]["securityContext"].pop("capabilities"),
    ),
    "writable root": Mutation("read-only-root", lambda o: first(o)["securityContext"].pop("readOnlyRootFilesystem")),
    "host network": Mutation("no-host", lambda o: pod(o).update(hostNetwork=True)),
    "host path": Mutation(
        "no-host", lambda o: pod(o)["volumes"].append({"name": "docker", "hostPath": {"path": "/var/run"}})
    ),
    "containers see each other": Mutation(
        "no-host", lambda o: head(o)["template"]["spec"].update(shareProcessNamespace=True)
    ),
    "token of the cluster": Mutation("no-cluster-token", lambda o: pod(o).pop("automountServiceAccountToken")),
    "default account": Mutation("no-cluster-token", lambda o: pod(o, "batch").pop("serviceAccountName")),
    "head reads the autoscaler's token": Mutation(
        "no-cluster-token",
        lambda o: head(o)["template"]["spec"]["containers"][0]["volumeMounts"].append(
            {"name": "autoscaler-token", "mountPath": "/token"}
        ),
    ),
    "memory overcommitted": Mutation(
        "memory-guaranteed", lambda o: first(o)["resources"]["requests"].update(memory="1Gi")
    ),
    "init container without limit": Mutation(
        "memory-guaranteed",
        lambda o: pod(o)["initContainers"][0]["resources"].pop("limits"),
    ),
    "unsized /dev/shm": Mutation(
        "shared-memory",
        lambda o: next(v for v in pod(o)["volumes"] if v["name"] == "shared-mem").update(
            emptyDir={"sizeLimit": "10Gi"}
        ),
    ),
    "object store beyond /dev/shm": Mutation(
        "shared-memory",
        lambda o: head(o)["rayStartParams"].update({"object-store-memory": "3000000000"}),
    ),
    "disk without bound": Mutation(
        "disk-bounded",
        lambda o: next(v for v in pod(o)["volumes"] if v["name"] == "tmp").update(emptyDir={}),
    ),
    "logs of the head without bound": Mutation(
        "disk-bounded",
        lambda o: cluster(o)["autoscalerOptions"]["volumeMounts"].pop(1),
    ),
    "jobs API without token": Mutation("ray-token", lambda o: cluster(o, "batch").pop("authOptions")),
    "token auth disabled": Mutation("ray-token", lambda o: cluster(o)["authOptions"].update(mode="disabled")),
    "service without token": Mutation(
        "api-token",
        lambda o: service(o)["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0].pop("env"),
    ),
    "dashboard on a load balancer": Mutation("inside-only", lambda o: head(o).update(serviceType="LoadBalancer")),
    "ingress": Mutation("inside-only", lambda o: head(o).update(enableIngress=True)),
    "Redis on a node port": Mutation(
        "inside-only",
        lambda o: find(o, "Service", "onepass-redis")["spec"].update(type="NodePort"),
    ),
    "key written down": Mutation(
        "secrets-by-reference",
        lambda o: first(o).update(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]),
    ),
    "password of Redis written down": Mutation(
        "secrets-by-reference",
        lambda o: service(o)["rayClusterConfig"]["gcsFaultToleranceOptions"].update(redisPassword={"value": "x"}),
    ),
    "secret in the manifests": Mutation(
        "secrets-by-reference",
        lambda o: o.append(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "onepass"}, "data": {}}
        ),
    ),
    "latest image": Mutation("images-pinned", lambda o: first(o).update(image="onepass-saliency:latest")),
    "image without tag": Mutation("images-pinned", lambda o: first(o).update(image="onepass-saliency")),
    "another Ray": Mutation("versions-agree", lambda o: cluster(o).update(rayVersion="2.50.0")),
    "cluster outlives its job": Mutation(
        "jobs-end",
        lambda o: find(o, "RayJob", "train")["spec"].update(shutdownAfterJobFinishes=False),
    ),
    "no retry": Mutation("jobs-end", lambda o: find(o, "RayJob", "batch")["spec"].update(backoffLimit=0)),
    "checkpoints on a pod's own disk": Mutation(
        "resumes",
        lambda o: reword(find(o, "RayJob", "train")["spec"], "--out s3://onepass/runs/ca", "--out /tmp/runs/ca"),
    ),
    "scores on a pod's own disk": Mutation(
        "resumes",
        lambda o: reword(find(o, "RayJob", "batch")["spec"], "--output /store/scores", "--output /models/scores"),
        overlay="local",
    ),
    "waits for nodes for ever": Mutation(
        "jobs-end",
        lambda o: find(o, "RayJob", "train")["spec"].pop("preRunningDeadlineSeconds"),
    ),
    "range of workers differs": Mutation(
        "elastic-range", lambda o: cluster(o)["workerGroupSpecs"][0].update(maxReplicas=16)
    ),
    "range without autoscaler": Mutation("elastic-range", lambda o: cluster(o).pop("enableInTreeAutoscaling")),
    "range of replicas differs": Mutation(
        "elastic-range",
        lambda o: service(o)["rayClusterConfig"]["workerGroupSpecs"][0].update(minReplicas=1),
    ),
    "work on the head": Mutation("gpus-on-workers", lambda o: head(o)["rayStartParams"].pop("num-cpus")),
    "engine from another GPU": Mutation(
        "one-kind-of-gpu",
        lambda o: find(o, "Job", "export")["spec"]["template"]["spec"].update(
            nodeSelector={"nvidia.com/gpu.product": "NVIDIA-T4"}
        ),
    ),
    "service forgets with its head": Mutation(
        "survives-its-head",
        lambda o: service(o)["rayClusterConfig"].pop("gcsFaultToleranceOptions"),
    ),
    "budget of no effect": Mutation(
        "disruption-budget",
        lambda o: find(o, "PodDisruptionBudget", "serve-head").update(
            spec={"maxUnavailable": 1, "selector": {"matchLabels": {"ray.io/node-type": "head"}}}
        ),
    ),
    "budget missing": Mutation("disruption-budget", lambda o: without(o, "PodDisruptionBudget", "serve-workers")),
    "no default deny": Mutation("network", lambda o: without(o, "NetworkPolicy", "default-deny")),
    "no DNS": Mutation("network", lambda o: without(o, "NetworkPolicy", "dns")),
    "dashboard open to all": Mutation(
        "network", lambda o: policy(o, "dashboard-from-operator")["ingress"][0].pop("from")
    ),
    "metadata service reachable": Mutation(
        "network",
        lambda o: policy(o, "object-storage")["egress"][0]["to"][0]["ipBlock"]["except"].remove("169.254.0.0/16"),
    ),
    "any port outwards": Mutation("network", lambda o: policy(o, "object-storage")["egress"][0].pop("ports")),
    "clusters see each other": Mutation(
        "network",
        lambda o: [
            rules[0].update({end: [{"podSelector": {}}]})
            for name in ("ray-train", "ray-batch")
            for rules, end in ((policy(o, name)["ingress"], "from"), (policy(o, name)["egress"], "to"))
        ],
    ),
    "Redis open to workers": Mutation(
        "network",
        lambda o: [
            policy(o, "redis")["ingress"][0]["from"][0].pop("matchExpressions", None),
            policy(o, "redis")["ingress"][0]["from"][0]["podSelector"].pop("matchExpressions"),
            policy(o, "serve-to-redis")["podSelector"].pop("matchExpressions"),
        ],
    ),
    "no storage": Mutation("network", lambda o: without(o, "NetworkPolicy", "object-storage")),
    "keys for some": Mutation(
        "storage-keys",
        lambda o: cluster(o, "batch")["workerGroupSpecs"][1]["template"]["spec"]["containers"][0].update(envFrom=[]),
        overlay="s3",
    ),
    "keys not for the nightly job": Mutation(
        "storage-keys",
        lambda o: nightly(o)["headGroupSpec"]["template"]["spec"]["initContainers"][0].pop("envFrom"),
        overlay="s3",
    ),
    "all workers fit on two nodes": Mutation(
        "elastic-range",
        lambda o: [
            *(first(o)["resources"][key].update({"nvidia.com/gpu": "4"}) for key in ("requests", "limits")),
            find(o, "RayJob", "train")["spec"].update(
                entrypoint=find(o, "RayJob", "train")["spec"]["entrypoint"].replace(
                    "--cpus-per-worker 8", "--cpus-per-worker 2"
                )
            ),
        ],
    ),
    "engine built without a GPU": Mutation(
        "one-kind-of-gpu",
        lambda o: [
            find(o, "Job", "export")["spec"]["template"]["spec"]["initContainers"][1]["resources"][key].pop(
                "nvidia.com/gpu"
            )
            for key in ("requests", "limits")
        ],
    ),
    "GPUs decode": Mutation(
        "decode-on-cpus",
        lambda o: [
            cluster(o, "batch")["workerGroupSpecs"].pop(),
            reword(find(o, "RayJob", "batch")["spec"], " --decode-cpus 32", ""),
        ],
    ),
    "more decoders than CPUs": Mutation(
        "decode-on-cpus",
        lambda o: reword(find(o, "RayJob", "batch")["spec"], "--decode-cpus 32", "--decode-cpus 64"),
    ),
    "Redis on a node that may vanish": Mutation(
        "lasting-nodes",
        lambda o: find(o, "StatefulSet", "onepass-redis")["spec"]["template"]["spec"].pop("nodeSelector"),
        overlay="spot",
    ),
    "head on a node that may vanish": Mutation(
        "lasting-nodes", lambda o: head(o)["template"]["spec"].pop("nodeSelector"), overlay="spot"
    ),
    "Ray leaves before its time": Mutation("grace-used", lambda o: first(o).pop("env"), overlay="spot"),
    "all traffic at once": Mutation(
        "step-by-step", lambda o: service(o).update(upgradeStrategy={"type": "NewCluster"})
    ),
    "steps of nothing": Mutation(
        "step-by-step",
        lambda o: service(o)["upgradeStrategy"]["clusterUpgradeOptions"].update(stepSizePercent=0),
    ),
    "gateway without seccomp": Mutation(
        "gateway-inside", lambda o: find(o, "ConfigMap", "onepass-gateway-defaults")["data"].pop("deployment")
    ),
    "gateway on a load balancer": Mutation(
        "gateway-inside", lambda o: find(o, "ConfigMap", "onepass-gateway-defaults")["data"].pop("service")
    ),
    "gateway of another class": Mutation(
        "gateway-inside",
        lambda o: service(o)["upgradeStrategy"]["clusterUpgradeOptions"].update(gatewayClassName="other"),
    ),
    "HPA beside Serve": Mutation(
        "scaled-by-serve",
        lambda o: o.append(
            {"kind": "HorizontalPodAutoscaler", "metadata": {"name": "serve", "namespace": "onepass", "labels": {}}}
        ),
    ),
    "alpha without a mark": Mutation(
        "alpha-marked", lambda o: find(o, "RayCronJob", "batch-nightly")["metadata"].pop("annotations")
    ),
    "nightly job on from the start": Mutation(
        "alpha-marked", lambda o: find(o, "RayCronJob", "batch-nightly")["spec"].update(suspend=False)
    ),
    "gateway shut off from the service": Mutation(
        "network", lambda o: without(o, "NetworkPolicy", "serve-from-gateway")
    ),
    "gateway open to all": Mutation("network", lambda o: policy(o, "gateway")["ingress"][0].pop("from")),
    "store in the cluster out of reach": Mutation(
        "network", lambda o: without(o, "NetworkPolicy", "object-storage-in-cluster"), overlay="s3"
    ),
    "Prometheus shut out": Mutation("network", lambda o: policy(o, "metrics")["ingress"][0]["ports"].pop(1)),
    "metrics of the service out of reach": Mutation("network", lambda o: without(o, "NetworkPolicy", "serve-metrics")),
    "operator cannot see the service": Mutation(
        "network", lambda o: without(o, "NetworkPolicy", "serve-from-operator")
    ),
    "no clean-up in Redis": Mutation(
        "network",
        lambda o: policy(o, "serve-to-redis")["podSelector"]["matchExpressions"][0]["values"].remove("redis-cleanup"),
    ),
    "autoscaler shut off from the API": Mutation("network", lambda o: without(o, "NetworkPolicy", "autoscaler")),
    "autoscaler reaches a whole network": Mutation(
        "api-server-alone",
        lambda o: policy(o, "autoscaler")["egress"][0].update(to=[{"ipBlock": {"cidr": "10.96.0.0/16"}}]),
    ),
    "pods reach the private network": Mutation(
        "network", lambda o: policy(o, "object-storage")["egress"][0]["to"][0]["ipBlock"]["except"].remove("10.0.0.0/8")
    ),
    "no DNS cache": Mutation("network", lambda o: policy(o, "dns")["egress"][0]["to"].pop(1)),
}


def caught_by(mutation: Mutation, objects: list[Object]) -> set[str]:
    """The rules that a mutation of an overlay's ``objects`` breaks."""
    objects = copy.deepcopy(objects)
    mutation.change(objects)
    return set(broken(objects))


def main() -> None:
    built = {name: build(K8S / "overlays" / name) for name in {m.overlay for m in MUTATIONS.values()}}
    print("| mutated manifest | overlay | rule that caught it |\n|---|---|---|")
    for name, mutation in MUTATIONS.items():
        rules = ", ".join(f"`{rule}`" for rule in sorted(caught_by(mutation, built[mutation.overlay])))
        print(f"| {name} | {mutation.overlay} | {rules or 'none'} |")


if __name__ == "__main__":
    main()

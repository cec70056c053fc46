"""Rules on work that ends, goes on after a loss, and takes the machines that it needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import yaml

from pipeline.placement import Machine, cpus_per_worker, room
from tests.k8s._manifests import COMPONENT, GATEWAY_CLASS, STEP_BY_STEP, Object, clusters, pods
from tests.k8s._rules import rule


@rule("jobs-end")
def jobs_end(objects: list[Object]) -> Iterator[str]:
    for where, spec, _ in clusters(objects):
        if where.startswith("RayService"):
            continue
        wanted = ("ttlSecondsAfterFinished", "activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit")
        if not spec.get("shutdownAfterJobFinishes") or not all(spec.get(key, 0) > 0 for key in wanted):
            yield where
        if "clusterSelector" in spec:
            yield f"{where} cannot be suspended"
    for o in objects:
        if o["kind"] == "Job" and not ({"backoffLimit", "activeDeadlineSeconds"} <= o["spec"].keys()):
            yield f"Job/{o['metadata']['name']}"


@rule("resumes")
def resumes(objects: list[Object]) -> Iterator[str]:
    """A retry is a new cluster, which goes on only from what lies outside of the old one."""
    for where, spec, cluster in clusters(objects):
        for target in re.findall(r"--out(?:put)? (\S+)", spec.get("entrypoint", "")):
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                pod = group["template"]["spec"]
                kept = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
                shared = [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] in kept]
                if "://" not in target and not any(target.startswith(f"{place}/") for place in shared):
                    yield f"{where}: {target} goes with the cluster"


@rule("elastic-range")
def elastic_range(objects: list[Object]) -> Iterator[str]:
    """The range of the program is the range of the cluster."""
    for where, spec, cluster in clusters(objects):
        first, *others = cluster["workerGroupSpecs"]
        fewest, most = first["minReplicas"], first["maxReplicas"]
        if any(not group["minReplicas"] == group["replicas"] == group["maxReplicas"] for group in others):
            yield f"{where}: a second group of varying size"
        if not fewest <= first["replicas"] <= most:
            yield f"{where}: replicas outside of its range"
        found = None
        if "serveConfigV2" in spec:
            found = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"]["replicas"]
        elif match := re.search(r"pipeline\.train .*--workers (\S+)", spec["entrypoint"]):
            found = match[1]
        if found is None:
            if fewest != most or cluster.get("enableInTreeAutoscaling"):
                yield f"{where}: a batch job's cluster has a fixed size"
            continue
        if found != f"{fewest}:{most}":
            yield f"{where}: {found} in the program, {fewest}:{most} in the cluster"
        if not cluster.get("enableInTreeAutoscaling") and first["replicas"] != most:
            yield f"{where}: nothing ever adds the other workers"
        elif "entrypoint" in spec and first["replicas"] < most and _fits(first, spec["entrypoint"], most):
            yield f"{where}: all workers fit on the first nodes, so that it never grows"


def _fits(group: Object, command: str, workers: int) -> bool:
    """Whether the first nodes have room for all training workers, of the size that these get where a run begins."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits.get("nvidia.com/gpu", 0))
    found = [Machine(cpus=int(limits["cpu"]), gpus=gpus)] * group["replicas"]
    asked = re.search(r"--cpus-per-worker (\d+)", command)
    each = int(asked[1]) if asked else cpus_per_worker(found, workers, gpu=gpus > 0)
    return room(found, each, gpu=gpus > 0) >= workers


@rule("gpus-on-workers")
def gpus_on_workers(objects: list[Object]) -> Iterator[str]:
    for where, _, cluster in clusters(objects):
        head = cluster["headGroupSpec"]
        if head["rayStartParams"].get("num-cpus") != "0" or "nvidia.com/gpu" in json.dumps(head):
            yield f"{where} runs work on its head"


@rule("one-kind-of-gpu")
def one_kind_of_gpu(objects: list[Object]) -> Iterator[str]:
    """An engine is built where it will run."""
    kinds = set()
    for pod in pods(objects):
        gpu = any("nvidia.com/gpu" in c.get("resources", {}).get("limits", {}) for c in pod.containers)
        if not gpu and any("export.trt" in c.get("command", []) for c in pod.containers):
            yield f"{pod.where} builds an engine without a GPU"
        if gpu and pod.labels[COMPONENT] in ("export", "batch", "serve"):
            kinds.add(pod.spec.get("nodeSelector", {}).get("nvidia.com/gpu.product"))
    if len(kinds) > 1 or None in kinds:
        yield f"kinds of GPU: {kinds}"


@rule("decode-on-cpus")
def decode_on_cpus(objects: list[Object]) -> Iterator[str]:
    """Scoring on GPUs has a group of CPUs alone, which is as large as the program expects."""
    for where, spec, cluster in clusters(objects):
        if "serving.batch" not in spec.get("entrypoint", "") or "nvidia.com/gpu" not in json.dumps(cluster):
            continue
        limits = [
            (group["replicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"])
            for group in cluster["workerGroupSpecs"]
        ]
        cpus = sum(nodes * int(has["cpu"]) for nodes, has in limits if "nvidia.com/gpu" not in has)
        asked = re.search(r"--decode-cpus (\d+)", spec["entrypoint"])
        if cpus == 0 or asked is None or int(asked[1]) != cpus:
            yield f"{where}: {cpus} CPUs without a GPU, {asked[1] if asked else 'none'} asked for"


@rule("lasting-nodes")
def lasting_nodes(objects: list[Object]) -> Iterator[str]:
    """Where some pods run on nodes that may vanish, those that others cannot do without run on nodes that stay."""
    capacity = "karpenter.sh/capacity-type"
    if not any(capacity in json.dumps(pod.spec.get("affinity", {})) for pod in pods(objects)):
        return
    for pod in pods(objects):
        needed = pod.role in ("head", "redis") or (pod.role == "worker" and pod.labels[COMPONENT] == "serve")
        if needed and pod.spec.get("nodeSelector", {}).get(capacity) != "on-demand":
            yield pod.where


@rule("grace-used")
def grace_used(objects: list[Object]) -> Iterator[str]:
    """Ray ends its processes after a time of its own, which has to fit the time that Kubernetes leaves it."""
    for pod in pods(objects):
        if pod.role in ("head", "worker"):
            environment = {e["name"]: e.get("value") for e in pod.spec["containers"][0].get("env", [])}
            drain = int(environment.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
            grace = pod.spec.get("terminationGracePeriodSeconds", 30)
            if not grace - 15 <= drain <= grace:
                yield f"{pod.where}: Ray ends after {drain} s, the pod after {grace} s"


@rule("step-by-step")
def step_by_step(objects: list[Object]) -> Iterator[str]:
    """A service on GPUs goes over to a new version by steps; KubeRay does that only with Ray's autoscaler."""
    for where, spec, cluster in clusters(objects):
        if "serveConfigV2" not in spec or "nvidia.com/gpu" not in json.dumps(cluster):
            continue
        strategy = spec.get("upgradeStrategy", {})
        options = strategy.get("clusterUpgradeOptions", {})
        step, surge = options.get("stepSizePercent", 0), options.get("maxSurgePercent", 100)
        if strategy.get("type") != STEP_BY_STEP or not cluster.get("enableInTreeAutoscaling"):
            yield f"{where} changes its version at once"
        elif not 0 < step <= surge <= 100 or not options.get("intervalSeconds", 0) > 0:
            yield f"{where}: steps of {step} %"


@rule("gateway-inside")
def gateway_inside(objects: list[Object]) -> Iterator[str]:
    """The gateway's pod and Service come from Istio's template, which only the defaults of its class make fit."""
    for where, spec, _ in clusters(objects):
        if spec.get("upgradeStrategy", {}).get("type") != STEP_BY_STEP:
            continue
        name = spec["upgradeStrategy"]["clusterUpgradeOptions"]["gatewayClassName"]
        data = next(
            (o["data"] for o in objects if o["metadata"].get("labels", {}).get(GATEWAY_CLASS) == name),
            {},
        )
        pod = yaml.safe_load(data.get("deployment", "{}")).get("spec", {}).get("template", {}).get("spec", {})
        if pod.get("securityContext", {}).get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{where}: the namespace refuses the pod of its gateway, which has no seccomp profile"
        if yaml.safe_load(data.get("service", "{}")).get("spec", {}).get("type") != "ClusterIP":
            yield f"{where}: its gateway is a load balancer"


@rule("scaled-by-serve")
def scaled_by_serve(objects: list[Object]) -> Iterator[str]:
    """Serve alone adds and removes replicas; a second hand on the same number would work against it."""
    for o in objects:
        if o["kind"] in ("HorizontalPodAutoscaler", "VerticalPodAutoscaler", "ScaledObject"):
            yield f"{o['kind']}/{o['metadata']['name']}"


@rule("alpha-marked")
def alpha_marked(objects: list[Object]) -> Iterator[str]:
    """A kind that is alpha says so, and does nothing until somebody wants it."""
    for o in objects:
        if o["kind"] == "RayCronJob" and (
            o["metadata"].get("annotations", {}).get("onepass-saliency/maturity") != "alpha"
            or o["spec"].get("suspend") is not True
        ):
            yield f"RayCronJob/{o['metadata']['name']}"


@rule("survives-its-head")
def survives_its_head(objects: list[Object]) -> Iterator[str]:
    for where, spec, cluster in clusters(objects):
        if "serveConfigV2" in spec:
            options = cluster.get("gcsFaultToleranceOptions", {})
            if not options.get("redisAddress") or not options.get("redisPassword"):
                yield f"{where} keeps no state in Redis"
            if not spec.get("excludeHeadPodFromServeSvc"):
                yield f"{where} sends requests through its head"


@rule("disruption-budget")
def disruption_budget(objects: list[Object]) -> Iterator[str]:
    """Pods of Ray have no scale that the disruption controller knows: only a whole ``minAvailable`` has an effect."""
    for o in objects:
        if o["kind"] == "PodDisruptionBudget" and (
            not isinstance(o["spec"].get("minAvailable"), int) or "maxUnavailable" in o["spec"]
        ):
            yield f"PodDisruptionBudget/{o['metadata']['name']}"
    for where, spec, cluster in clusters(objects):
        fewest = cluster["workerGroupSpecs"][0]["minReplicas"]
        if "serveConfigV2" in spec and fewest > 1:
            budgets = {
                o["spec"]["selector"]["matchLabels"].get("ray.io/node-type"): o["spec"].get("minAvailable")
                for o in objects
                if o["kind"] == "PodDisruptionBudget"
            }
            worker = budgets.get("worker")
            if "head" not in budgets or not isinstance(worker, int) or not worker < fewest:
                yield f"{where} has no budget"

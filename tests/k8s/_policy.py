"""The security rules, each a function from built objects to what breaks it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import yaml

from pipeline.placement import Machine, cpus_per_worker, room
from tests.k8s._manifests import COMPONENT, GATEWAY_CLASS, NAMESPACE, STEP_BY_STEP, Object, Pod, clusters, pods, size
from tests.k8s._network import End, lets_through

Rule = Callable[[list[Object]], Iterator[str]]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return register


def broken(objects: list[Object]) -> dict[str, list[str]]:
    """The rules that are broken, with where."""
    found = {name: list(function(objects)) for name, function in RULES.items()}
    return {name: places for name, places in found.items() if places}


def containers(objects: list[Object]) -> Iterator[tuple[Pod, str, Object]]:
    for pod in pods(objects):
        for container in pod.containers:
            yield pod, f"{pod.where} {container['name']}", container


@rule("namespace-restricted")
def namespace_restricted(objects: list[Object]) -> Iterator[str]:
    for o in objects:
        if o["kind"] == "Namespace":
            if o["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
                yield o["metadata"]["name"]
        elif o["metadata"].get("namespace") != NAMESPACE and GATEWAY_CLASS not in o["metadata"]["labels"]:
            yield f"{o['kind']}/{o['metadata']['name']} is not in {NAMESPACE}"


@rule("non-root")
def non_root(objects: list[Object]) -> Iterator[str]:
    for pod in pods(objects):
        security = pod.spec.get("securityContext", {})
        user = 1000 if pod.ours else 999
        if security.get("runAsNonRoot") is not True or security.get("runAsUser") != user:
            yield pod.where
        for container in pod.containers:
            if {"runAsUser", "runAsNonRoot"} & container.get("securityContext", {}).keys():
                yield f"{pod.where} {container['name']} has a user of its own"


@rule("seccomp")
def seccomp(objects: list[Object]) -> Iterator[str]:
    for pod in pods(objects):
        if pod.spec.get("securityContext", {}).get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield pod.where
        for container in pod.containers:
            if "seccompProfile" in container.get("securityContext", {}):
                yield f"{pod.where} {container['name']} has a profile of its own"


@rule("no-privileges")
def no_privileges(objects: list[Object]) -> Iterator[str]:
    for _, where, container in containers(objects):
        security = container.get("securityContext", {})
        if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
            yield where


@rule("no-capabilities")
def no_capabilities(objects: list[Object]) -> Iterator[str]:
    for _, where, container in containers(objects):
        if container.get("securityContext", {}).get("capabilities") != {"drop": ["ALL"]}:
            yield where


@rule("read-only-root")
def read_only_root(objects: list[Object]) -> Iterator[str]:
    for pod, where, container in containers(objects):
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield where
        mounted = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
        if pod.ours and "/tmp" not in mounted:
            yield f"{where} has no /tmp to write to"


@rule("no-host")
def no_host(objects: list[Object]) -> Iterator[str]:
    for pod in pods(objects):
        if any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield pod.where
        if any("hostPath" in volume for volume in pod.spec.get("volumes", [])):
            yield f"{pod.where} mounts the host"
        if any("hostPort" in port for container in pod.containers for port in container.get("ports", [])):
            yield f"{pod.where} takes a port of the host"


@rule("no-cluster-token")
def no_cluster_token(objects: list[Object]) -> Iterator[str]:
    accounts = {o["metadata"]["name"]: o for o in objects if o["kind"] == "ServiceAccount"}
    for name, account in accounts.items():
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount/{name}"
    for pod in pods(objects):
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield pod.where
        if pod.spec.get("serviceAccountName") not in accounts:
            yield f"{pod.where} has no account of its own"
        tokens = {
            volume["name"]
            for volume in pod.spec.get("volumes", [])
            if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
        }
        for container in pod.containers:
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            if tokens & mounted and container["name"] != "autoscaler":
                yield f"{pod.where} {container['name']} mounts a token of the cluster"
            if container["name"] == "autoscaler" and not tokens & mounted:
                yield f"{pod.where}: the autoscaler cannot ask the API server"


@rule("memory-guaranteed")
def memory_guaranteed(objects: list[Object]) -> Iterator[str]:
    for _, where, container in containers(objects):
        resources = container.get("resources", {})
        asked, most = (resources.get(key, {}).get("memory") for key in ("requests", "limits"))
        if asked is None or asked != most or "cpu" not in resources.get("requests", {}):
            yield where


@rule("shared-memory")
def shared_memory(objects: list[Object]) -> Iterator[str]:
    for pod in pods(objects):
        if pod.role not in ("head", "worker"):
            continue
        container = pod.spec["containers"][0]
        names = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
        volume = next((v for v in pod.spec.get("volumes", []) if v["name"] == names.get("/dev/shm")), {})
        memory = volume.get("emptyDir", {})
        store = int(pod.group["rayStartParams"].get("object-store-memory", 0))
        if memory.get("medium") != "Memory" or "sizeLimit" not in memory:
            yield f"{pod.where} has no sized /dev/shm"
        elif not 0 < store <= size(memory["sizeLimit"]) < size(container["resources"]["limits"]["memory"]):
            yield f"{pod.where}: object store <= /dev/shm < memory does not hold"


@rule("disk-bounded")
def disk_bounded(objects: list[Object]) -> Iterator[str]:
    for pod in pods(objects):
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.where} {volume['name']}"


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


@rule("network")
def network(objects: list[Object]) -> Iterator[str]:
    policies = [o for o in objects if o["kind"] == "NetworkPolicy"]
    for source, target, port, protocol, wanted in connections(objects):
        if lets_through(policies, source, target, port, protocol=protocol) is not wanted:
            yield f"{source.name} -> {target.name}:{port}/{protocol} is {'shut' if wanted else 'open'}"


def connections(objects: list[Object]) -> Iterator[tuple[End, End, int, str, bool]]:
    """(from, to, port, protocol, whether it has to work)."""
    ends: dict[tuple[str, str], End] = {}
    for pod in pods(objects):
        key = (pod.labels[COMPONENT], pod.role)
        ends[key] = End(" ".join(key), pod.labels)
    dns = End("DNS", {"k8s-app": "kube-dns"}, namespace="kube-system")
    operator = End("operator", {"app.kubernetes.io/name": "kuberay-operator"}, namespace="kuberay-system")
    prometheus = End("Prometheus", {"app.kubernetes.io/name": "prometheus"}, namespace="monitoring")
    client = End("client", {}, namespace="shop", namespace_labels={"onepass-saliency/client": "true"})
    stranger = End("stranger", {}, namespace="elsewhere")
    lodger = End("unlabelled pod", {})
    storage = End("object storage", address="52.216.8.13")
    metadata = End("metadata service", address="169.254.169.254")
    private = End("private network", address="10.20.30.40")
    dns_cache = End("DNS of the node", address="169.254.20.10")
    agent = End("agent of EKS Pod Identity", address="169.254.170.23")
    store = End("store in the cluster", {}, namespace="minio", namespace_labels={"onepass-saliency/storage": "true"})
    istiod = End("istiod", {"app": "istiod"}, namespace="istio-system")
    cleanup = End("Redis cleanup", {COMPONENT: "serve", "ray.io/node-type": "redis-cleanup"})
    with_keys = any(has_keys(pod.spec["containers"][0]) for pod in pods(objects))
    with_agent = any(o["kind"] == "NetworkPolicy" and o["metadata"]["name"] == "pod-identity" for o in objects)

    for end in ends.values():
        yield end, dns, 53, "UDP", True
        yield end, dns, 53, "TCP", True
        yield end, dns_cache, 53, "UDP", True
        yield end, dns_cache, 80, "TCP", False
        yield end, stranger, 80, "TCP", False
        yield end, metadata, 80, "TCP", False
        yield end, metadata, 443, "TCP", False
        yield end, storage, 80, "TCP", False
        yield stranger, end, 8000, "TCP", False
        yield stranger, end, 8265, "TCP", False
        yield stranger, end, 6379, "TCP", False
        yield lodger, end, 8265, "TCP", False
    redis = ends["platform", "redis"]
    yield cleanup, redis, 6379, "TCP", True
    if any(spec.get("upgradeStrategy", {}).get("type") == STEP_BY_STEP for _, spec, _ in clusters(objects)):
        gateway = End("gateway", {"gateway.networking.k8s.io/gateway-name": "serve-gateway"})
        yield gateway, dns, 53, "UDP", True
        yield gateway, istiod, 15012, "TCP", True
        yield gateway, storage, 443, "TCP", False
        yield gateway, redis, 6379, "TCP", False
        yield client, gateway, 80, "TCP", True
        yield stranger, gateway, 80, "TCP", False
        yield lodger, gateway, 80, "TCP", False
        for (component, role), end in ends.items():
            yield gateway, end, 8000, "TCP", component == "serve" and role in ("head", "worker")
            yield gateway, end, 8265, "TCP", False
    for (component, role), end in ends.items():
        works = role in ("head", "worker", "job") and component != "data"
        yield end, storage, 443, "TCP", works
        yield end, store, 443, "TCP", works and with_keys
        yield end, store, 9000, "TCP", works and with_keys
        yield end, agent, 80, "TCP", works and with_agent
        yield end, redis, 6379, "TCP", (component, role) == ("serve", "head")
        for port in (8080, 44217, 44227):
            yield prometheus, end, port, "TCP", role in ("head", "worker")
        yield prometheus, end, 8000, "TCP", component == "serve" and role in ("head", "worker")
        yield operator, end, 8265, "TCP", role == "head"
        yield operator, end, 8000, "TCP", component == "serve" and role == "head"
        yield client, end, 8000, "TCP", component == "serve" and role in ("head", "worker")
        yield client, end, 8265, "TCP", False
        elastic = role == "head" and component in ("train", "serve")
        yield end, private, 443, "TCP", elastic
        yield end, private, 6443, "TCP", elastic
        yield end, private, 9000, "TCP", False
    for (component, role), end in ends.items():
        for (other, its_role), peer in ends.items():
            if its_role not in ("head", "worker"):
                continue
            same = component == other
            if role in ("head", "worker"):
                for port in (6379, 8265, 23456):
                    yield end, peer, port, "TCP", same
            elif role == "submit":
                yield end, peer, 8265, "TCP", same and its_role == "head"
                yield end, peer, 6379, "TCP", False
            elif role == "redis":
                yield end, peer, 6379, "TCP", False

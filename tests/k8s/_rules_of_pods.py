"""Rules on what a pod may do to its node, its neighbours and the cluster."""

from __future__ import annotations

from collections.abc import Iterator

from tests.k8s._manifests import GATEWAY_CLASS, NAMESPACE, Object, pods, size
from tests.k8s._rules import containers, rule


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
        if pod.spec.get("shareProcessNamespace"):
            yield f"{pod.where}: each container reads the others' files, and the autoscaler's token"
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
        if pod.role == "head" and pod.cluster.get("enableInTreeAutoscaling"):
            for container in (pod.spec["containers"][0], pod.containers[-1]):
                if "/tmp/ray" not in {mount["mountPath"] for mount in container.get("volumeMounts", [])}:
                    yield f"{pod.where} {container['name']}: KubeRay shares /tmp/ray without a bound"

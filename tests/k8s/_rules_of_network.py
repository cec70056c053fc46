"""Rules on which connections work, and which do not."""

from __future__ import annotations

from collections.abc import Iterator

from tests.k8s._manifests import COMPONENT, STEP_BY_STEP, Object, clusters, pods
from tests.k8s._network import End, lets_through
from tests.k8s._rules import rule
from tests.k8s._rules_of_access import has_keys


def api_servers(objects: list[Object]) -> list[str]:
    """The addresses at which autoscalers may ask for pods."""
    policies = (o for o in objects if o["kind"] == "NetworkPolicy" and o["metadata"]["name"] == "autoscaler")
    peers = (peer for policy in policies for rule in policy["spec"]["egress"] for peer in rule.get("to", [{}]))
    return [peer.get("ipBlock", {}).get("cidr", "0.0.0.0/0") for peer in peers]


def on_one_machine(objects: list[Object]) -> bool:
    """Whether everything is on one node, with its storage."""
    return any(o["kind"] == "PersistentVolumeClaim" for o in objects)


@rule("api-server-alone")
def api_server_alone(objects: list[Object]) -> Iterator[str]:
    """Heads reach single addresses of the private network; on one machine, where the API server has none of its own, all."""
    if not on_one_machine(objects):
        yield from (f"autoscaler may reach {cidr}" for cidr in api_servers(objects) if not cidr.endswith("/32"))


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
    api_server = End("API server", address=next(iter(api_servers(objects)), "192.0.2.1/32").partition("/")[0])
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
        for other in (storage, private, stranger):  # a port that nothing here uses
            yield end, other, 31337, "TCP", False
            yield end, other, 31337, "UDP", False
        for port in (6379, 8000, 8080):
            yield lodger, end, port, "TCP", False
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
        if elastic:  # others reach it on port 443 as well where its address is public
            yield end, api_server, 443, "TCP", True
        yield end, api_server, 6443, "TCP", elastic
        yield end, private, 443, "TCP", elastic and on_one_machine(objects)
        yield end, private, 6443, "TCP", elastic and on_one_machine(objects)
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

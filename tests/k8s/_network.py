"""What NetworkPolicies let through, as the Kubernetes documentation defines it (equality and set selectors, IPv4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod, or with ``address`` something outside of the cluster."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "onepass"
    namespace_labels: dict[str, str] = field(default_factory=dict)
    address: str | None = None

    @property
    def in_namespace(self) -> dict[str, str]:
        return {"kubernetes.io/metadata.name": self.namespace} | self.namespace_labels


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector fits."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for term in selector.get("matchExpressions", []):
        there, values = labels.get(term["key"]), term.get("values", [])
        fits = {
            "In": there in values,
            "NotIn": there not in values,
            "Exists": there is not None,
            "DoesNotExist": there is None,
        }
        if not fits[term["operator"]]:
            return False
    return True


def lets_through(
    policies: list[dict[str, Any]], source: End, target: End, port: int, *, protocol: str = "TCP", here: str = "onepass"
) -> bool:
    """Whether a pod at ``source`` may open a connection to ``target``; policies are those of the namespace ``here``."""
    leaves = source.namespace != here or source.address is not None
    arrives = target.namespace != here or target.address is not None
    return (leaves or _one_way(policies, "Egress", "egress", "to", source, target, port, protocol, here)) and (
        arrives or _one_way(policies, "Ingress", "ingress", "from", target, source, port, protocol, here)
    )


def _one_way(
    policies: list[dict[str, Any]],
    kind: str,
    rules: str,
    peers: str,
    pod: End,
    peer: End,
    port: int,
    protocol: str,
    here: str,
) -> bool:
    specs = [p["spec"] for p in policies if selects(p["spec"]["podSelector"], pod.labels)]
    specs = [s for s in specs if kind in s.get("policyTypes", ["Ingress"])]
    if not specs:
        return True
    for spec in specs:
        for rule in spec.get(rules, []):
            ports = rule.get("ports")
            open_port = ports is None or any(
                p.get("protocol", "TCP") == protocol and p.get("port", port) == port for p in ports
            )
            if open_port and (peers not in rule or any(_is_peer(p, peer, here) for p in rule[peers])):
                return True
    return False


def _is_peer(rule: dict[str, Any], end: End, here: str) -> bool:
    if "ipBlock" in rule:
        if end.address is None:
            return False
        address = ip_address(end.address)
        block = rule["ipBlock"]
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(cidr) for cidr in block.get("except", [])
        )
    if end.address is not None:
        return False
    if "namespaceSelector" in rule:
        if not selects(rule["namespaceSelector"], end.in_namespace):
            return False
    elif end.namespace != here:
        return False
    return selects(rule.get("podSelector", {}), end.labels)

"""Who reaches whom at which ports, by the network policies alone, against the table of what is meant.

Evaluated as Kubernetes does it (concepts/services-networking/network-policies): a pod that no policy takes in a
direction is open in it; else what any of them lets through. Between two pods of ours both ends have to agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.manifests.documents import Document, ManifestError, name_of
from tests.manifests.pods import HEAD_GROUP, pods_of

ANY = "any"
SUBMITTER = "submitter"
_NAME = "kubernetes.io/metadata.name"
_OWN_NAMESPACE = {_NAME: "expertmesh"}
_TEMPTING = {
    "app.kubernetes.io/name": "kuberay-operator",
    "k8s-app": "kube-dns",
    "ray.io/cluster": "expertmesh",
    "ray.io/node-type": "head",
    "ray.io/group": "gateway",
    "expertmesh.io/role": "submitter",
}


@dataclass(frozen=True)
class Party:
    """One end of a connection. ``namespace``: the labels of the one that it is in, None for what is no pod at all.
    ``ports``: of a pod of ours, by name."""

    name: str
    namespace: Mapping[str, str] | None
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)


OUTSIDERS = (
    Party("a client", {_NAME: "shop", "expertmesh.io/clients": "true"}),
    Party("KubeRay's operator", {_NAME: "kuberay"}, {"app.kubernetes.io/name": "kuberay-operator"}),
    Party("monitoring", {_NAME: "monitoring"}),
    Party("DNS", {_NAME: "kube-system"}, {"k8s-app": "kube-dns"}),
    Party("another pod of kube-system", {_NAME: "kube-system"}),
    Party("another pod of kuberay", {_NAME: "kuberay"}),
    Party("a neighbour", _OWN_NAMESPACE),
    Party("an impostor", {_NAME: "elsewhere"}, _TEMPTING),
    Party("an address", None),
)


def meant() -> dict[tuple[str, str], str]:
    """Ports by (from, to); who is not in it must not reach the other."""
    cluster = (HEAD_GROUP, "gateway", "attention", "experts")
    flows = {(one, other): ANY for one in cluster for other in cluster}
    # the API server is anywhere
    flows |= {(HEAD_GROUP, party.name): "TCP 443, TCP 6443" for party in OUTSIDERS}
    flows |= {(name, "DNS"): "TCP 53, UDP 53" for name in (*cluster, SUBMITTER)}
    flows |= {(name, "monitoring"): "TCP 4318" for name in cluster}
    flows[HEAD_GROUP, "DNS"] = "TCP 443, TCP 53, TCP 6443, UDP 53"
    flows[HEAD_GROUP, "monitoring"] = "TCP 4318, TCP 443, TCP 6443"
    flows |= {("monitoring", name): "TCP 8080" for name in cluster}
    flows["monitoring", "gateway"] = "TCP 8080, TCP 9464"
    flows["a client", "gateway"] = "TCP 50051, TCP 8000"
    flows["KubeRay's operator", HEAD_GROUP] = "TCP 8265"
    flows[SUBMITTER, HEAD_GROUP] = "TCP 8265"
    return flows


def traffic_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Of a deployment together with everything that may be put beside it."""
    found, wanted = flows_of(list(documents)), meant()
    for pair in sorted(found.keys() | wanted.keys()):
        if found.get(pair) != wanted.get(pair):
            yield (
                f"network policies: {pair[0]} reaches {pair[1]} at {found.get(pair, 'no port')}, "
                f"must be {wanted.get(pair, 'no port')}"
            )


def flows_of(documents: list[Document]) -> dict[tuple[str, str], str]:
    """Ports by (from, to), without pairs that cannot speak. Between outsiders nothing is known."""
    policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
    ours = [Party(pod.group or SUBMITTER, _OWN_NAMESPACE, pod.labels, pod.ports) for pod in pods_of(documents)]
    flows: dict[tuple[str, str], str] = {}
    for source in (*ours, *OUTSIDERS):
        for target in (*ours, *OUTSIDERS):
            ways_out = _allowed(policies, "Egress", source, target) if source in ours else {ANY}
            ways_in = _allowed(policies, "Ingress", source, target) if target in ours else {ANY}
            ports = ways_in if ANY in ways_out else ways_out if ANY in ways_in else ways_out & ways_in
            if ports and (source in ours or target in ours):
                flows[source.name, target.name] = ANY if ANY in ports else ", ".join(sorted(ports))
    return flows


def _allowed(policies: list[Document], direction: str, source: Party, target: Party) -> set[str]:
    """Ports of ``target`` that the policies of the end in question let through."""
    near, far, peers = (source, target, "to") if direction == "Egress" else (target, source, "from")
    ports: set[str] = set()
    closed = False
    for policy in policies:
        spec = policy["spec"]
        if direction not in spec["policyTypes"] or not _matches(policy, spec["podSelector"], near.labels):
            continue
        closed = True
        for rule in spec.get(direction.lower(), []):
            if not rule.get(peers) or any(_takes(policy, peer, far) for peer in rule[peers]):
                ports |= _ports(rule["ports"], target) if rule.get("ports") else {ANY}
    return ports if closed else {ANY}


def _takes(policy: Document, peer: Mapping[str, Any], party: Party) -> bool:
    if "ipBlock" in peer:
        return party.namespace is None
    if party.namespace is None:
        return False
    if "namespaceSelector" in peer:
        if not _matches(policy, peer["namespaceSelector"], party.namespace):
            return False
    elif party.namespace != _OWN_NAMESPACE:
        return False
    return _matches(policy, peer.get("podSelector", {}), party.labels)


def _matches(policy: Document, selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if unknown := selector.keys() - {"matchLabels"}:
        raise ManifestError(f"{name_of(policy)}: {', '.join(unknown)}: this evaluation knows matchLabels only")
    wanted: Mapping[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def _ports(ports: list[Mapping[str, Any]], target: Party) -> set[str]:
    """A name that the target has no port of lets nothing through."""
    found = set()
    for port in ports:
        number = port.get("port", ANY)
        number = target.ports.get(number) if isinstance(number, str) and number != ANY else number
        last = f"-{port['endPort']}" if "endPort" in port else ""
        if number is not None:
            found.add(f"{port.get('protocol', 'TCP')} {number}{last}")
    return found

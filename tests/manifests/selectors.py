"""What finds pods by labels and ports by name: Services, disruption budgets, network policies, monitors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.manifests.documents import Document, name_of
from tests.manifests.pods import Pod, pods_of


def selector_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Selectors that find no pod of ``documents``, and ports that none of those has."""
    documents = list(documents)
    pods = pods_of(documents)
    for document in documents:
        if document["kind"] == "Service":
            yield from _service_problems(document, pods)
        elif document["kind"] == "PodDisruptionBudget":
            yield from _choose(document, _labels(document), pods)[1]
        elif document["kind"] == "NetworkPolicy":
            yield from _policy_problems(document, pods)
        elif document["kind"] == "PodMonitor":
            yield from _monitor_problems(document, pods)
    for pod in pods:
        yield from _spread_problems(pod)
        yield from _port_problems(pod)


def fence_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Pods that no policy closes in both directions. Of one kustomization: its pods are closed before others come."""
    documents = list(documents)
    for pod in pods_of(documents):
        if not any(_closes(document) and pod.matches(_labels(document)) for document in documents):
            yield f"{pod.where}: no NetworkPolicy closes it in both directions"


def _service_problems(document: Document, pods: list[Pod]) -> Iterator[str]:
    chosen, problems = _choose(document, document["spec"].get("selector", {}), pods)
    yield from problems
    for port in document["spec"]["ports"]:
        target = port.get("targetPort", port["port"])
        for pod in chosen:
            if target not in pod.ports and target not in pod.ports.values():
                yield f"{name_of(document)}: targetPort {target}: {pod.where} has {_ports(pod)}"


def _policy_problems(document: Document, pods: list[Pod]) -> Iterator[str]:
    spec = document["spec"]
    chosen, problems = _choose(document, _labels(document), pods)
    yield from problems
    for rule in spec.get("ingress", []):
        yield from _named_ports(document, rule, chosen)
        for peer in rule.get("from", []):
            _, problems = _peer(document, peer, pods)
            yield from problems
    for rule in spec.get("egress", []):
        for peer in rule.get("to", []):
            targets, problems = _peer(document, peer, pods)
            yield from problems
            yield from _named_ports(document, rule, targets)


def _monitor_problems(document: Document, pods: list[Pod]) -> Iterator[str]:
    chosen, problems = _choose(document, document["spec"]["selector"]["matchLabels"], pods)
    yield from problems
    for endpoint in document["spec"]["podMetricsEndpoints"]:
        if not any(endpoint["port"] in pod.ports for pod in chosen):
            yield f"{name_of(document)}: port {endpoint['port']}: none of its pods has it"
    for pod in chosen:
        if not any(endpoint["port"] in pod.ports for endpoint in document["spec"]["podMetricsEndpoints"]):
            yield f"{name_of(document)}: {pod.where} is chosen, but has none of the ports"


def _spread_problems(pod: Pod) -> Iterator[str]:
    for constraint in pod.spec.get("topologySpreadConstraints", []):
        if not pod.matches(constraint.get("labelSelector", {}).get("matchLabels", {})):
            yield f"{pod.where}: topologySpreadConstraints: its selector does not match the pod itself"


def _port_problems(pod: Pod) -> Iterator[str]:
    names = [port["name"] for container in pod.spec["containers"] for port in container.get("ports", [])]
    numbers = [port["containerPort"] for container in pod.spec["containers"] for port in container.get("ports", [])]
    for found in (names, numbers):
        if len(set(found)) != len(found):
            yield f"{pod.where}: ports: {found}: one comes twice"


def _choose(document: Document, wanted: Mapping[str, str], pods: list[Pod]) -> tuple[list[Pod], list[str]]:
    chosen = [pod for pod in pods if pod.matches(wanted)]
    problem = f"{name_of(document)}: selector {dict(wanted)}: no pod has these labels"
    return chosen, [] if chosen and wanted else [problem]


def _peer(document: Document, peer: dict[str, Any], pods: list[Pod]) -> tuple[list[Pod], list[str]]:
    """Pods of ours that a rule names; those of other namespaces are not ours to check."""
    if "podSelector" not in peer or "namespaceSelector" in peer:
        return [], []
    return _choose(document, peer["podSelector"].get("matchLabels", {}), pods)


def _named_ports(document: Document, rule: dict[str, Any], pods: list[Pod]) -> Iterator[str]:
    for port in rule.get("ports", []):
        if isinstance(port["port"], str) and not any(port["port"] in pod.ports for pod in pods):
            yield f"{name_of(document)}: port {port['port']}: none of its pods has it"


def _labels(document: Document) -> dict[str, str]:
    selector = document["spec"].get("podSelector", document["spec"].get("selector", {}))
    labels: dict[str, str] = selector.get("matchLabels", {})
    return labels


def _closes(document: Document) -> bool:
    return document["kind"] == "NetworkPolicy" and set(document["spec"].get("policyTypes", [])) == {"Ingress", "Egress"}


def _ports(pod: Pod) -> str:
    return ", ".join(f"{name} {number}" for name, number in pod.ports.items()) or "no ports"

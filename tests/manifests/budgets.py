"""PodDisruptionBudgets: each group of workers has one, it leaves enough pods, and lets a drain come to an end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.config import ServerConfig
from tests.manifests.documents import Document, name_of
from tests.manifests.pods import Pod, pods_of


def budget_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Without a look at the server's configuration; that a selector finds no pod at all is the matter of selectors."""
    documents = list(documents)
    for pod in pods_of(documents):
        found = [name_of(budget) for budget in _budgets(pod, documents)]
        # Kubernetes' eviction refuses a pod that two choose, however many there are
        if "minReplicas" in pod.ray and len(found) != 1:
            yield f"{pod.where}: must be in one PodDisruptionBudget, is in {', '.join(found) or 'none'}"
    for budget in documents:
        if budget["kind"] == "PodDisruptionBudget":
            yield from _count_problems(budget, [pod for pod in pods_of(documents) if _takes(budget, pod)])


def copy_problems(config: ServerConfig, documents: Iterable[Document]) -> Iterator[str]:
    """A drain may take fewer pods at once than have each expert, or it stops all streams."""
    documents = list(documents)
    copies = config.experts.min_replicas
    wanted = config.experts.node_labels.items()
    for pod in pods_of(documents):
        if pod.ray and wanted <= pod.ray.get("labels", {}).items():
            for budget in _budgets(pod, documents):
                gone = _least_pods(pod) - (_min_available(budget) or 0)
                if gone >= copies:
                    yield f"{name_of(budget)}: lets {gone} pods go at once, must be fewer than min_replicas: {copies}"


def _count_problems(budget: Document, chosen: list[Pod]) -> Iterator[str]:
    least, most = _min_available(budget), sum(_least_pods(pod) for pod in chosen)
    # of pods whose owner has no scale subresource, as a RayCluster, Kubernetes does not know how many there should be
    if least is None or "maxUnavailable" in budget["spec"]:
        yield f"{name_of(budget)}: needs minAvailable as a number: for pods of a RayCluster nothing else works"
    elif chosen and not 0 < least <= max(1, most - 1):  # one pod alone is moved by hand
        yield f"{name_of(budget)}: minAvailable {least}, but there may be {most} pods, and one must be free to go"


def _budgets(pod: Pod, documents: list[Document]) -> list[Document]:
    return [one for one in documents if one["kind"] == "PodDisruptionBudget" and _takes(one, pod)]


def _takes(budget: Document, pod: Pod) -> bool:
    return pod.matches(budget["spec"].get("selector", {}).get("matchLabels", {}))


def _min_available(budget: Document) -> int | None:
    """None if it is no number: a share, or not said."""
    least = budget["spec"].get("minAvailable")
    return least if isinstance(least, int) else None


def _least_pods(pod: Pod) -> int:
    least: int = pod.ray.get("minReplicas", 1)
    return least

"""What containers ask for and may take, and what claims ask for: names and numbers that no schema knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tests.manifests.documents import Document, ManifestError, name_of
from tests.manifests.pods import pods_of
from tests.manifests.quantities import amount

GPU = "nvidia.com/gpu"
_NEEDED = {"cpu", "memory"}
_NAMES = {*_NEEDED, "ephemeral-storage", GPU}
_EQUAL = {
    "memory": "what is promised must be there",
    GPU: "Kubernetes lends no parts of devices",
}
_ACCESS_MODES = {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"}


def resource_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Of every container, the autoscaler's too, and of every claim, also of the one that KubeRay makes for the head."""
    documents = list(documents)
    for pod in pods_of(documents):
        for container in pod.containers:
            yield from _container_problems(f"{pod.where}: {container['name']}", container.get("resources", {}))
    for document in documents:
        where, spec = name_of(document), document.get("spec", {})
        if document["kind"] == "RayCluster":
            resources = spec.get("autoscalerOptions", {}).get("resources", {})
            yield from _container_problems(f"{where}: autoscalerOptions", resources)
            storage = spec.get("gcsFaultToleranceOptions", {}).get("storage")
            if storage is not None:
                where = f"{where}: gcsFaultToleranceOptions.storage"
                yield from _claim_problems(where, storage.get("accessModes", []), storage.get("size", ""))
        elif document["kind"] == "PersistentVolumeClaim":
            asked = spec.get("resources", {}).get("requests", {})
            yield from _claim_problems(where, spec.get("accessModes", []), asked.get("storage", ""))


def _container_problems(where: str, resources: dict[str, Any]) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for part, found in (("requests", requests), ("limits", limits)):
        if missing := _NEEDED - found.keys():
            yield f"{where}: resources.{part}: {', '.join(sorted(missing))} missing"
        if unknown := found.keys() - _NAMES:
            allowed = ", ".join(sorted(_NAMES))
            yield f"{where}: resources.{part}: {', '.join(sorted(unknown))} not allowed; allowed: {allowed}"
    for name in sorted(_NAMES):
        asked, most = amount(requests.get(name, 0)), amount(limits.get(name, 0))
        if name in _EQUAL and asked != most:
            yield f"{where}: resources: {name} of requests and limits differ; {_EQUAL[name]}"
        elif name in requests and name in limits and asked > most:
            yield f"{where}: resources: {name}: requests {requests[name]} are above limits {limits[name]}"


def _claim_problems(where: str, modes: list[str], size: str | int) -> Iterator[str]:
    if not modes or not set(modes) <= _ACCESS_MODES:
        yield f"{where}: accessModes {modes}: allowed are {', '.join(sorted(_ACCESS_MODES))}"
    try:
        least = amount(size)
    except ManifestError as error:
        yield f"{where}: storage {error}"
        return
    if least < 1:
        yield f"{where}: storage {size}: must be some bytes"

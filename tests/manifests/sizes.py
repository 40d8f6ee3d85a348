"""Bytes: memory that a pod is promised, and what is kept in memory of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tests.manifests.documents import Document, name_of
from tests.manifests.pods import Pod, pods_of
from tests.manifests.quantities import amount

GIB = 2**30
_MOST = 2048 * GIB
_RAY = 2 * GIB
"""A node of Ray, the dashboard's agent, and a process of ours, without weights."""
_HELPER = GIB // 2
"""The autoscaler, and the client that hands a job in."""


def size_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Of every pod template, and of the container that KubeRay puts beside the head."""
    documents = list(documents)
    for pod in pods_of(documents):
        least = _RAY + _in_memory(pod) if pod.group else _HELPER
        for container in pod.containers:
            yield from _memory_problems(f"{pod.where}: {container['name']}", container["resources"], least)
        yield from _store_problems(pod)
    for document in documents:
        if document["kind"] == "RayCluster":
            resources = document["spec"]["autoscalerOptions"].get("resources", {"limits": {}})
            yield from _memory_problems(f"{name_of(document)}: autoscalerOptions", resources, _HELPER)


def _memory_problems(where: str, resources: dict[str, Any], least: int) -> Iterator[str]:
    told = resources["limits"].get("memory", 0)
    if not least <= amount(told) <= _MOST:
        yield f"{where}: memory {told}: must be {least / GIB:g} to {_MOST / GIB:g} GiB"


def _in_memory(pod: Pod) -> int:
    """What the volumes may take of the pod's memory."""
    volumes = [volume.get("emptyDir", {}) for volume in pod.spec.get("volumes", [])]
    return sum(int(amount(volume.get("sizeLimit", _MOST))) for volume in volumes if volume.get("medium") == "Memory")


def _store_problems(pod: Pod) -> Iterator[str]:
    """Ray's object store lives in /dev/shm."""
    if not pod.group:
        return
    store = int(pod.ray.get("rayStartParams", {}).get("object-store-memory", 0))
    mounts = {mount["mountPath"]: mount["name"] for mount in pod.container.get("volumeMounts", [])}
    shared = [v["emptyDir"] for v in pod.spec.get("volumes", []) if v["name"] == mounts.get("/dev/shm")]
    room = int(amount(shared[0].get("sizeLimit", 0))) if shared and shared[0].get("medium") == "Memory" else 0
    if not 0 < store <= room:
        yield f"{pod.where}: object-store-memory {store}: must fit in /dev/shm, an emptyDir in memory of {room} bytes"

"""What is in the Secrets and ConfigMaps, and the paths at which scripts, jobs and the configuration look for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from tests.manifests.documents import Document
from tests.manifests.pods import HEAD_GROUP, Pod, pods_of

SECRET_KEYS = {
    "expertmesh-access": {"access.yaml"},
    "expertmesh-tls": {"tls.crt", "tls.key"},
    "expertmesh-batch": {"ca.crt", "token"},
}
"""Made by the operator as docs/deploy.md says."""


def secret_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Files that no Secret or ConfigMap brings, and keys that nobody reads."""
    documents = list(documents)
    for pod in pods_of(documents):
        text = "\n".join(_texts(pod, documents))
        for folder, name, keys in _mounted(pod, documents):
            read = set(re.findall(rf"{folder}/([\w.-]+)", text))
            for file in sorted(read - keys):
                yield f"{pod.where}: {folder}/{file}: {name} has {', '.join(sorted(keys))}"
            # that of another configuration of the same pod may be left over
            if unread := keys - read if name in SECRET_KEYS else set():
                yield f"{pod.where}: {name}: {', '.join(sorted(unread))}: nothing reads it"


def _mounted(pod: Pod, documents: list[Document]) -> Iterator[tuple[str, str, set[str]]]:
    """Folders with the name of what is mounted there, and its keys."""
    maps = {d["metadata"]["name"]: set(d["data"]) for d in documents if d["kind"] == "ConfigMap"}
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    for mount in pod.container.get("volumeMounts", []):
        volume: dict[str, Any] = volumes.get(mount["name"], {})
        name = volume.get("secret", {}).get("secretName") or volume.get("configMap", {}).get("name")
        if name in SECRET_KEYS | maps:
            yield mount["mountPath"], name, (SECRET_KEYS | maps)[name]


def _texts(pod: Pod, documents: list[Document]) -> Iterator[str]:
    """What the pod's processes are told: its command, the files of its ConfigMaps; in the head, the jobs."""
    yield from [*pod.container.get("command", []), *pod.container.get("args", [])]
    mounted = {v["configMap"]["name"] for v in pod.spec.get("volumes", []) if "configMap" in v}
    for document in documents:
        if document["kind"] == "ConfigMap" and document["metadata"]["name"] in mounted:
            yield from document["data"].values()
        elif document["kind"] == "RayJob" and pod.group == HEAD_GROUP:
            yield document["spec"]["entrypoint"]

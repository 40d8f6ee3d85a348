"""What every pod has to give up: root, capabilities, a writable root file system, whatever it does not name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tests.manifests.documents import Document, name_of
from tests.manifests.image import HOME, UID
from tests.manifests.pods import HEAD_GROUP, Pod, pods_of
from tests.manifests.secrets import SECRET_KEYS

OPERATOR_MADE = {("PersistentVolumeClaim", "expertmesh-models"), *(("Secret", name) for name in SECRET_KEYS)}
"""Not in the manifests: their contents are the operator's. docs/deploy.md says how to make them."""

# fsGroup: else the image's user can neither write the claims nor read the Secrets
_POD = {
    "runAsNonRoot": True,
    "runAsUser": UID,
    "runAsGroup": UID,
    "fsGroup": UID,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINER = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
_POD_SECURITY = "pod-security.kubernetes.io/"
_NAMESPACE = {f"{_POD_SECURITY}{mode}": "restricted" for mode in ("enforce", "warn")}
_WRITTEN = ("/tmp", HOME)
_VOLUMES = {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}
_HOST = ("hostNetwork", "hostPID", "hostIPC")


def security_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Of every pod template, and of the container that KubeRay puts beside the head."""
    documents = list(documents)
    made = {(d["kind"], d["metadata"]["name"]) for d in documents} | OPERATOR_MADE
    for pod in pods_of(documents):
        yield from _pod_problems(pod, made)
        yield from _volume_problems(pod, made)
        for container in pod.containers:
            yield from _container_problems(f"{pod.where}: {container['name']}", container)
    for document in documents:
        if document["kind"] == "RayCluster":
            yield from _autoscaler_problems(document)
        elif document["kind"] == "Namespace":
            yield from _namespace_problems(document)
        elif document["kind"] == "ServiceAccount" and document.get("automountServiceAccountToken") is not False:
            yield f"{name_of(document)}: automountServiceAccountToken must be false: nothing in its pods needs one"
        elif document["kind"] == "Service" and document["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield f"{name_of(document)}: type: {document['spec']['type']}, must be ClusterIP: an overlay may open it"


def _pod_problems(pod: Pod, made: set[tuple[str, str]]) -> Iterator[str]:
    context = pod.spec.get("securityContext", {})
    yield from _differences(f"{pod.where}: securityContext", context, _POD)
    for key in _HOST:
        if pod.spec.get(key):
            yield f"{pod.where}: {key} is not allowed"
    # only the autoscaler, beside the head, has something to ask the API server
    if pod.spec.get("automountServiceAccountToken") is not (pod.group == HEAD_GROUP):
        yield f"{pod.where}: automountServiceAccountToken must be said: true for the head, else false"
    account = pod.spec.get("serviceAccountName")
    if account is not None and ("ServiceAccount", account) not in made:
        yield f"{pod.where}: serviceAccountName: no ServiceAccount/{account}"


def _container_problems(where: str, container: dict[str, Any]) -> Iterator[str]:
    context = container.get("securityContext", {})
    yield from _differences(f"{where}: securityContext", context, _CONTAINER)
    if unknown := context.keys() - _CONTAINER.keys():
        yield f"{where}: securityContext: {', '.join(sorted(unknown))} not allowed; allowed: {', '.join(_CONTAINER)}"


def _volume_problems(pod: Pod, made: set[tuple[str, str]]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    mounts = [mount for container in pod.containers for mount in container.get("volumeMounts", [])]
    mounted = {mount["name"] for mount in mounts}
    if unknown := mounted - volumes.keys():
        yield f"{pod.where}: volumeMounts: no volume {', '.join(sorted(unknown))}"
    if unused := volumes.keys() - mounted:
        yield f"{pod.where}: volumes: {', '.join(sorted(unused))} not mounted"
    empty = {m["mountPath"] for m in mounts if "emptyDir" in volumes.get(m["name"], {})}
    for folder in _WRITTEN:
        if folder not in empty:
            yield f"{pod.where}: {folder} must be an emptyDir: it is written, and the root file system is read-only"
    for name, volume in volumes.items():
        if refused := volume.keys() - _VOLUMES - {"name"}:
            yield f"{pod.where}: volume {name}: {', '.join(sorted(refused))} not allowed"
        for reference in _references(volume):
            if reference not in made:
                yield f"{pod.where}: volume {name}: no {'/'.join(reference)}"


def _references(volume: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "configMap" in volume:
        yield "ConfigMap", volume["configMap"]["name"]
    if "secret" in volume:
        yield "Secret", volume["secret"]["secretName"]
    if "persistentVolumeClaim" in volume:
        yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]


def _autoscaler_problems(document: Document) -> Iterator[str]:
    options = document["spec"].get("autoscalerOptions", {})
    where = f"{document['kind']}/{document['metadata']['name']}: autoscalerOptions"
    yield from _differences(f"{where}.securityContext", options.get("securityContext", {}), _CONTAINER)
    volumes = {v["name"] for v in document["spec"]["headGroupSpec"]["template"]["spec"].get("volumes", [])}
    mounts = {mount["mountPath"]: mount["name"] for mount in options.get("volumeMounts", [])}
    if missing := set(_WRITTEN) - mounts.keys():
        yield f"{where}.volumeMounts: {', '.join(sorted(missing))} missing: the root file system is read-only"
    if unknown := set(mounts.values()) - volumes:
        yield f"{where}.volumeMounts: the head has no volume {', '.join(sorted(unknown))}"


def _namespace_problems(document: Document) -> Iterator[str]:
    """A misspelt mode is just another label to Kubernetes."""
    labels = document["metadata"].get("labels", {})
    yield from _differences(f"{name_of(document)}: labels", labels, _NAMESPACE)
    for key in labels.keys() - _NAMESPACE.keys():
        if key.startswith(_POD_SECURITY):
            yield f"{name_of(document)}: labels: {key} not allowed; allowed: {', '.join(_NAMESPACE)}"


def _differences(where: str, found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for key, value in wanted.items():
        if found.get(key) != value:
            yield f"{where}.{key}: {found.get(key)}, must be {value}"

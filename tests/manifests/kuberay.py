"""What KubeRay's operator refuses or does behind the schema, and what of its offers has to be used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

from tests.manifests.documents import Document, name_of
from tests.manifests.pods import GATEWAY_GROUP, HEAD_GROUP, Pod, pods_of

START_COMMAND = "$KUBERAY_GEN_RAY_START_CMD"
_OVERWRITE = "ray.io/overwrite-container-cmd"
_JOB_MODE = "K8sJobMode"
_REDIS = {"redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"}


def kuberay_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Of RayClusters and RayJobs; jobs may name a cluster and a Service of ``documents`` only."""
    documents = list(documents)
    for document in documents:
        if document["kind"] == "RayCluster":
            yield from _cluster_problems(document)
            for pod in pods_of([document]):
                yield from _group_problems(pod)
                yield from _start_problems(document, pod, documents)
        elif document["kind"] == "RayJob":
            yield from _job_problems(document, documents)
    yield from _image_problems(documents)


def _cluster_problems(document: Document) -> Iterator[str]:
    spec, where = document["spec"], name_of(document)
    if spec.get("rayVersion") != version("ray"):
        yield f"{where}: rayVersion: {spec.get('rayVersion')}, but the image has {version('ray')} (constraints.txt)"
    if spec.get("authOptions", {}).get("mode") != "token":
        yield f"{where}: authOptions.mode must be token: Ray's ports are code execution"
    if not spec.get("enableInTreeAutoscaling") or spec.get("autoscalerOptions", {}).get("version") != "v2":
        yield f"{where}: needs enableInTreeAutoscaling and autoscalerOptions.version: v2, which knows labels"
    if spec["headGroupSpec"].get("serviceType", "ClusterIP") != "ClusterIP":
        yield f"{where}: headGroupSpec.serviceType must be ClusterIP: Ray's ports are code execution"
    options = spec.get("gcsFaultToleranceOptions", {})
    backend = options.get("backend")
    if backend == "rocksdb" and (redis := _REDIS & options.keys()):
        yield f"{where}: gcsFaultToleranceOptions: {', '.join(sorted(redis))} not allowed with rocksdb"
    elif backend == "redis" and ("storage" in options or "redisAddress" not in options):
        yield f"{where}: gcsFaultToleranceOptions: redis needs redisAddress and takes no storage"
    elif backend is None:
        yield f"{where}: gcsFaultToleranceOptions.backend: without one the loss of the head ends everything"
    names = [group["groupName"] for group in spec.get("workerGroupSpecs", [])]
    if len(set(names)) != len(names):
        yield f"{where}: workerGroupSpecs: {names}: a name comes twice"


def _group_problems(pod: Pod) -> Iterator[str]:
    if "labels" in pod.ray.get("rayStartParams", {}):
        yield f"{pod.where}: rayStartParams.labels: KubeRay refuses it; use the group's labels"
    if pod.spec.get("restartPolicy", "Never") != "Never":
        yield f"{pod.where}: restartPolicy: {pod.spec['restartPolicy']}: with autoscaler v2 only Never"
    if pod.group in (HEAD_GROUP, GATEWAY_GROUP) and pod.ray.get("rayStartParams", {}).get("num-cpus") != "0":
        yield f'{pod.where}: rayStartParams.num-cpus must be "0": no shard there'
    if "minReplicas" in pod.ray:
        least, now, most = (int(pod.ray.get(key, 0)) for key in ("minReplicas", "replicas", "maxReplicas"))
        if not 0 < least <= now <= most:
            yield f"{pod.where}: minReplicas {least}, replicas {now}, maxReplicas {most}: must grow, from 1"
    if "serviceAccountName" not in pod.spec and pod.labels["ray.io/node-type"] == "worker":
        yield f"{pod.where}: serviceAccountName is missing"


def _start_problems(document: Document, pod: Pod, documents: list[Document]) -> Iterator[str]:
    """With the annotation KubeRay runs what is said here alone, so each container has to run its command itself."""
    overwritten = document["metadata"].get("annotations", {}).get(_OVERWRITE) == "true"
    command = [*pod.container.get("command", []), *pod.container.get("args", [])]
    if not overwritten:
        if command:
            yield f"{pod.where}: command: without the annotation {_OVERWRITE} KubeRay runs Ray beside it or not at all"
        return
    texts = [*command, *(_script(word, pod, documents) for word in command)]
    if not any(START_COMMAND in text and "ulimit -n" in text for text in texts):
        yield f"{pod.where}: command: does not raise `ulimit -n` and run {START_COMMAND}, as {_OVERWRITE} asks for"


def _script(path: str, pod: Pod, documents: list[Document]) -> str:
    """The text of a ConfigMap's file that is mounted at ``path``; "" if none is."""
    folder, _, name = path.rpartition("/")
    mounts: list[dict[str, Any]] = pod.container.get("volumeMounts", [])
    volumes = {mount["name"] for mount in mounts if mount["mountPath"] == folder}
    maps = {v["configMap"]["name"] for v in pod.spec.get("volumes", []) if v["name"] in volumes and "configMap" in v}
    for document in documents:
        if document["kind"] == "ConfigMap" and document["metadata"]["name"] in maps:
            return str(document["data"].get(name, ""))
    return ""


def _job_problems(document: Document, documents: list[Document]) -> Iterator[str]:
    spec, where = document["spec"], name_of(document)
    cluster = spec.get("clusterSelector", {}).get("ray.io/cluster")
    if not any(d["kind"] == "RayCluster" and d["metadata"]["name"] == cluster for d in documents):
        yield f"{where}: clusterSelector: no RayCluster {cluster!r}"
    if "rayClusterSpec" in spec or spec.get("shutdownAfterJobFinishes"):
        yield f"{where}: with clusterSelector the cluster is not the job's to make or to end"
    # the API server takes any text; of KubeRay's other modes none makes a pod of submitterPodTemplate
    if (mode := spec.get("submissionMode")) != _JOB_MODE:
        yield f"{where}: submissionMode: {mode}, must be {_JOB_MODE}"
    if "backoffLimit" in spec:
        yield f"{where}: backoffLimit: KubeRay refuses it with clusterSelector; use submitterConfig"
    target = re.search(r"--target[ =](\S+):(\d+)", spec["entrypoint"])
    doors = {
        f"{d['metadata']['name']}:{port['port']}"
        for d in documents
        if d["kind"] == "Service"
        for port in d["spec"]["ports"]
        if port["name"] == "grpc"
    }
    if target is None or f"{target[1]}:{target[2]}" not in doors:
        yield f"{where}: entrypoint: {target and target[0]}: no Service has it for gRPC; there are {sorted(doors)}"
    head = next((pod for pod in pods_of(documents) if pod.labels.get("ray.io/node-type") == "head"), None)
    mounted = [mount["mountPath"] for mount in head.container["volumeMounts"]] if head else []
    for path in re.findall(r"(?<=\s)/\S+", spec["entrypoint"]):
        if not any(path.startswith(f"{folder}/") for folder in mounted):
            yield f"{where}: entrypoint: {path}: the head, where it runs, mounts {mounted}"


def _image_problems(documents: list[Document]) -> Iterator[str]:
    """One image for all of Ray: its parts speak to each other in their own version only."""
    images = {container["image"] for pod in pods_of(documents) if pod.group for container in pod.containers}
    if len(images) > 1:
        yield f"images differ: {', '.join(sorted(images))}"
    for image in sorted({container["image"] for pod in pods_of(documents) for container in pod.containers}):
        name, _, tag = image.rpartition(":")
        if name.rpartition("/")[2] != "expertmesh" or not re.fullmatch(rf"{version('expertmesh')}(-cpu|-cuda)?", tag):
            yield f"image {image}: must be expertmesh:{version('expertmesh')}, with -cpu or -cuda"

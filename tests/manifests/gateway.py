"""The server's configuration against the pods that it is meant for: ports, probes, files, labels, room."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.access import missing_locks
from cluster.config import ConfigError, ServerConfig, load_config
from cluster.gateway.grpc_door import INFERENCE
from tests.manifests.budgets import copy_problems
from tests.manifests.documents import Document, name_of
from tests.manifests.pods import GATEWAY_GROUP, Pod, pods_of
from tests.manifests.quantities import amount
from tests.manifests.resources import GPU

CONFIG_MAP, CONFIG_FILE = "expertmesh-config", "server.yaml"
SCRIPT = "gateway.sh"
_PORTS = {"grpc": "port", "http": "http_port", "health": "health_port", "metrics": "metrics_port"}
_PROBES = {"startupProbe": "", "livenessProbe": "", "readinessProbe": INFERENCE}
_ISTIO = "sidecar.istio.io"
_INBOUND = "traffic.sidecar.istio.io/includeInboundPorts"
STOP_S = 90
"""As `ray job stop` is given for the same (cluster/ray): the gateway's drain, the fleets, Ray's own actors."""
ACCESS = f"access:\n  tokens:\n    - {{sha256: '{'0' * 64}', tenant: example}}\n"
"""What the operator's Secret adds to the ConfigMap's text."""


def gateway_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Of one deployment: it has to have exactly one configuration and one pod for the gateway."""
    documents = list(documents)
    pods = pods_of(documents)
    maps = [d for d in documents if d["kind"] == "ConfigMap" and d["metadata"]["name"] == CONFIG_MAP]
    gateways = [pod for pod in pods if pod.group == GATEWAY_GROUP]
    if len(maps) != 1 or len(gateways) != 1 or not {CONFIG_FILE, SCRIPT} <= maps[0]["data"].keys():
        yield f"expected one ConfigMap {CONFIG_MAP} with {CONFIG_FILE} and {SCRIPT}, and one group {GATEWAY_GROUP!r}"
        return
    text = maps[0]["data"][CONFIG_FILE]
    try:
        _load(text)
        config = _load(text + ACCESS)
    except ConfigError as error:
        yield f"{name_of(maps[0])}: {CONFIG_FILE}: {error}"
        return
    yield from _lock_problems(config, gateways[0])
    yield from _door_problems(config, gateways[0])
    yield from _probe_problems(config, gateways[0])
    yield from _one_problems(gateways[0], maps[0]["data"][SCRIPT])
    yield from _service_problems(config, gateways[0], documents)
    if config.gateway.insecure:
        yield from _mesh_problems(config, gateways[0])
    for fleet in ("attention", "experts"):
        yield from _room_problems(config, fleet, pods)
    yield from _model_problems(config, pods)
    yield from _image_problems(config, pods)
    yield from copy_problems(config, documents)


def _load(text: str) -> ServerConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_text(text, encoding="utf-8")
        return load_config(path)


def _lock_problems(config: ServerConfig, pod: Pod) -> Iterator[str]:
    if bool(missing_locks(config)) != config.gateway.insecure:
        missing = ", ".join(missing_locks(config)) or "nothing"
        yield f"gateway.insecure: {config.gateway.insecure}, but of the locks {missing} is missing"
    if config.gateway.tls is not None:
        for file in (config.gateway.tls.certificate, config.gateway.tls.key):
            if not _is_mounted(file, pod):
                yield f"gateway.tls: {file}: nothing is mounted there in {pod.where}"


def _door_problems(config: ServerConfig, pod: Pod) -> Iterator[str]:
    for name, key in _PORTS.items():
        port = getattr(config.gateway, key)
        if pod.ports.get(name) != port or not port:
            yield f"gateway.{key}: {port}, but {pod.where} has port {name}: {pod.ports.get(name)}"
    if config.gateway.host not in ("0.0.0.0", "::"):
        yield f"gateway.host: {config.gateway.host}: nobody outside of the pod reaches it; allowed: 0.0.0.0, ::"


def _probe_problems(config: ServerConfig, pod: Pod) -> Iterator[str]:
    for name, service in _PROBES.items():
        probe = pod.container.get(name, {})
        if (found := probe.get("grpc")) != (wanted := {"port": config.gateway.health_port, "service": service}):
            yield f"{pod.where}: {name}.grpc: {found}, must be {wanted}"
    startup = pod.container.get("startupProbe", {})
    patience = startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3)
    if patience < config.start_timeout_s:
        yield f"{pod.where}: startupProbe gives up after {patience} s; start_timeout_s is {config.start_timeout_s:g}"


def _one_problems(pod: Pod, script: str) -> Iterator[str]:
    """There is one, it ends as `expertmesh serve`, and it has the time to."""
    for key in ("minReplicas", "replicas", "maxReplicas"):
        if pod.ray.get(key) != 1:
            yield f"{pod.where}: {key}: {pod.ray.get(key)}, must be 1: a second `expertmesh serve` is refused"
    last = script.strip().splitlines()[-1]
    if last != "exec expertmesh serve --config /tmp/server.yaml" or f"> /tmp/{CONFIG_FILE}\n" not in script:
        yield f"{SCRIPT}: {last}: must write /tmp/{CONFIG_FILE} and end as `expertmesh serve` with it"
    if pod.container.get("command") != ["/bin/bash", f"/etc/expertmesh/{SCRIPT}"]:
        yield f"{pod.where}: command: {pod.container.get('command')}, must run {SCRIPT}"
    pause = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    if pause <= 0 or grace < pause + STOP_S:
        needed = f"preStop ({pause} s, must be some) and a stop take {pause + STOP_S} s"
        yield f"{pod.where}: terminationGracePeriodSeconds {grace}: {needed}"


def _service_problems(config: ServerConfig, pod: Pod, documents: list[Document]) -> Iterator[str]:
    """Each door under its name and number, and with what is spoken there."""
    plain = config.gateway.insecure
    spoken = {"grpc": "kubernetes.io/h2c" if plain else "https", "http": "http" if plain else "https"}
    services = [d for d in documents if d["kind"] == "Service" and pod.matches(d["spec"].get("selector", {}))]
    for service in services:
        for port in service["spec"]["ports"]:
            name = port["name"]
            found = (port.get("targetPort"), port["port"], port.get("appProtocol"))
            if found != (wanted := (name, pod.ports.get(name), spoken.get(name))):
                yield f"{name_of(service)}: port {name}: targetPort, port, appProtocol {found}, must be {wanted}"


def _mesh_problems(config: ServerConfig, pod: Pod) -> Iterator[str]:
    """Plaintext is for a sidecar alone."""
    doors = f"{config.gateway.port},{config.gateway.http_port}"
    annotations = pod.ray["template"].get("metadata", {}).get("annotations", {})
    if pod.labels.get(f"{_ISTIO}/inject") != "true":
        yield f"{pod.where}: gateway.insecure is true, but no label {_ISTIO}/inject puts a sidecar there"
    if annotations.get(_INBOUND) != doors:
        yield f"{pod.where}: {_INBOUND}: {annotations.get(_INBOUND)}, must be {doors}"


def _room_problems(config: ServerConfig, fleet: str, pods: list[Pod]) -> Iterator[str]:
    """Exactly one group of pods has the fleet's label, and the shards of the start fit in it."""
    section = getattr(config, fleet)
    wanted: Mapping[str, str] = section.node_labels
    chosen = [pod for pod in pods if pod.ray and wanted.items() <= pod.ray.get("labels", {}).items()]
    if len(chosen) != 1 or not wanted:
        groups = ", ".join(pod.group for pod in chosen) or "no group"
        yield f"{fleet}.node_labels: {dict(wanted)}: must be the labels of one group, but are those of {groups}"
        return
    (pod,) = chosen
    limits = pod.container["resources"]["limits"]
    room = int(float(amount(pod.ray.get("rayStartParams", {}).get("num-cpus", limits["cpu"]))) // section.cpus)
    if config.device == "cuda":
        room = min(room, int(float(amount(limits.get(GPU, 0))) // section.gpus))
    elif GPU in limits:
        yield f"{pod.where}: asks for {GPU}, but device is {config.device}"
    count = section.shards + section.spares if fleet == "experts" else section.replicas
    if count > room * pod.ray["minReplicas"]:
        yield f"{fleet}: {count} bundles, but the least number of pods of {pod.group} has room for {room} each"
    if fleet == "experts" and pod.ray["minReplicas"] < section.min_replicas:
        least = pod.ray["minReplicas"]
        yield f"experts.min_replicas: {section.min_replicas}, but {pod.group} may have only {least} pods"


def _model_problems(config: ServerConfig, pods: list[Pod]) -> Iterator[str]:
    """The checkpoint's folder is there in every pod that reads it."""
    roles = {"gateway", *(value for s in (config.attention, config.experts) for value in s.node_labels.values())}
    for pod in pods:
        if pod.group in roles and config.model != "default" and not _is_mounted(Path(config.model), pod):
            yield f"model: {config.model}: nothing is mounted there in {pod.where}"


def _image_problems(config: ServerConfig, pods: list[Pod]) -> Iterator[str]:
    """Ray's pods run what the device needs: an image for CPUs finds no GPU, one with CUDA is gigabytes more."""
    for image in sorted({container["image"] for pod in pods if pod.group for container in pod.containers}):
        if image.endswith("-cuda") != (config.device == "cuda"):
            yield f"image {image}: device is {config.device}; only cuda, and always cuda, takes an image with -cuda"


def _is_mounted(path: Path, pod: Pod) -> bool:
    mounts: list[dict[str, Any]] = pod.container.get("volumeMounts", [])
    return any(PurePosixPath(path).is_relative_to(mount["mountPath"]) for mount in mounts if mount.get("readOnly"))

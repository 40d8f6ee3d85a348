"""The pods that KubeRay makes of the manifests: their templates, with the labels that it adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.manifests.documents import Document, name_of

HEAD_GROUP = "headgroup"
GATEWAY_GROUP = "gateway"


@dataclass(frozen=True)
class Pod:
    """``group``: Ray's, "" for a pod outside of it. ``ray``: the group's part of the RayCluster."""

    where: str
    group: str
    labels: Mapping[str, str]
    spec: dict[str, Any]
    ray: dict[str, Any]

    @property
    def container(self) -> dict[str, Any]:
        """The first one: the one that KubeRay runs Ray in."""
        first: dict[str, Any] = self.spec["containers"][0]
        return first

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Those of the start, too."""
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    @property
    def ports(self) -> dict[str, int]:
        """By name."""
        return {port["name"]: port["containerPort"] for c in self.spec["containers"] for port in c.get("ports", [])}

    def matches(self, wanted: Mapping[str, str]) -> bool:
        """True if a selector with these labels takes this pod. An empty one takes every pod."""
        return wanted.items() <= self.labels.items()


def pods_of(documents: Iterable[Document]) -> list[Pod]:
    """All pod templates of ``documents``."""
    pods: list[Pod] = []
    for document in documents:
        if document["kind"] == "RayCluster":
            pods += _of_cluster(document)
        elif document["kind"] == "RayJob" and "submitterPodTemplate" in document["spec"]:
            template = document["spec"]["submitterPodTemplate"]
            labels = template.get("metadata", {}).get("labels", {})
            pods.append(Pod(f"{name_of(document)}: submitter", "", labels, template["spec"], {}))
    return pods


def _of_cluster(document: Document) -> list[Pod]:
    cluster, spec = document["metadata"]["name"], document["spec"]
    groups = [(HEAD_GROUP, "head", spec["headGroupSpec"])]
    groups += [(group["groupName"], "worker", group) for group in spec.get("workerGroupSpecs", [])]
    return [
        Pod(
            f"{name_of(document)}: group {name}",
            name,
            {
                **group["template"].get("metadata", {}).get("labels", {}),
                **group.get("labels", {}),
                "ray.io/cluster": cluster,
                "ray.io/group": name,
                "ray.io/node-type": node_type,
            },
            group["template"]["spec"],
            group,
        )
        for name, node_type, group in groups
    ]

"""Turns a placement plan into Ray placement groups. The only file of this room that knows Ray."""

from __future__ import annotations

from collections.abc import Collection

import ray
from ray.exceptions import GetTimeoutError
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from placement.spec import BundleRequest, Node

NODE_ID_LABEL = "ray.io/node-id"


class NoRoom(RuntimeError):
    """No node could take a bundle in time."""


def ray_nodes() -> list[Node]:
    """Every node that Ray knows, with the logical CPUs and the GPUs that are free now."""
    free = ray._private.state.available_resources_per_node()
    return [
        Node(
            node_id=info["NodeID"],
            address=info["NodeManagerAddress"],
            cpus_free=float(free.get(info["NodeID"], {}).get("CPU", 0.0)),
            labels=dict(info.get("Labels") or {}),
            alive=bool(info["Alive"]),
            gpus_free=float(free.get(info["NodeID"], {}).get("GPU", 0.0)),
            gpus=float(info["Resources"].get("GPU", 0.0)),
        )
        for info in ray.nodes()
    ]


def create_group(
    name: str, request: BundleRequest, node_id: str | None, without: Collection[str] = ()
) -> PlacementGroup:
    """One detached group of one bundle called ``name``, on ``node_id``, or for None on any node with the labels but
    those of the ids ``without``."""
    selector = {NODE_ID_LABEL: node_id} if node_id is not None else dict(request.labels)
    if node_id is None and without:
        selector[NODE_ID_LABEL] = f"!in({','.join(sorted(without))})"
    return placement_group(
        [{"CPU": request.cpus, **({"GPU": request.gpus} if request.gpus else {})}],
        strategy="STRICT_PACK",
        name=name,
        lifetime="detached",
        bundle_label_selector=[selector] if selector else None,
    )


def wait_for_group(group: PlacementGroup, request: BundleRequest, timeout_s: float) -> None:
    """Wait until the bundle is reserved; NoRoom says what was wanted and what the nodes had."""
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except GetTimeoutError as error:
        offers = "; ".join(f"{n.address}: {_free(n)}, labels {_own(n)}" for n in ray_nodes() if n.alive)
        gpus = f", {request.gpus:g} GPU" if request.gpus else ""
        raise NoRoom(
            f"bundle {request.name}: no node with {request.cpus:g} CPU{gpus} and labels {dict(request.labels)} "
            f"within {timeout_s:g} s; nodes: {offers or 'none'}"
        ) from error


def node_of(group: PlacementGroup) -> str:
    """Node id of the group's only bundle; the group must be ready."""
    return str(placement_group_table(group)["bundles_to_node_id"][0])


def remove_group(group: PlacementGroup) -> None:
    """Give the bundle back. Actors inside it are killed by Ray."""
    remove_placement_group(group)


def _free(node: Node) -> str:
    return f"{node.cpus_free:g} CPU" + (f" and {node.gpus_free:g} GPU" if node.gpus else "") + " free"


def _own(node: Node) -> dict[str, str]:
    return {key: value for key, value in node.labels.items() if not key.startswith("ray.io/")}

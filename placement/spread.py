"""Which node each bundle goes to. Pure; ``bundles`` turns the answer into placement groups."""

from __future__ import annotations

from collections.abc import Sequence

from placement.spec import BundleRequest, Node

_EPSILON = 1e-9


def spread(requests: Sequence[BundleRequest], nodes: Sequence[Node]) -> list[str | None]:
    """Node id per request, spreading the requests over as many nodes as there are.

    Among the nodes that match the labels and have the CPUs and GPUs left, the one that holds the fewest of these
    requests is taken; ties go to the one with more CPUs free, then to the smaller node id, so that the answer is the
    same for the same input. None where no node has room now: such a bundle waits for one.
    """
    free = {node.node_id: node.cpus_free for node in nodes if node.alive}
    gpus = {node.node_id: node.gpus_free for node in nodes}
    held = dict.fromkeys(free, 0)
    by_id = {node.node_id: node for node in nodes}
    chosen: list[str | None] = []
    for request in requests:
        fitting = [
            n
            for n in free
            if request.fits(by_id[n]) and free[n] + _EPSILON >= request.cpus and gpus[n] + _EPSILON >= request.gpus
        ]
        node_id = min(fitting, key=lambda n: (held[n], -free[n], n), default=None)
        if node_id is not None:
            free[node_id] -= request.cpus
            gpus[node_id] -= request.gpus
            held[node_id] += 1
        chosen.append(node_id)
    return chosen

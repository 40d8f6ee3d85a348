"""Turns KubeRay's CRDs into the files under ``schemas/``: ``python -m tests.manifests.crds FOLDER`` with the CRD files
(``helm-chart/kuberay-operator/crds/`` of github.com/ray-project/kuberay, Apache-2.0), for a new version of KubeRay."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).parent / "schemas"
KINDS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
VERSION = "v1"


def schema_file(kind: str) -> Path:
    """Where the schema of ``kind`` lies."""
    return SCHEMAS / f"{kind.lower()}-{VERSION}.json.gz"


def without_descriptions(node: Any) -> Any:
    """A schema without its prose. A property may be called "description": that one is a mapping, and stays."""
    if isinstance(node, list):
        return [without_descriptions(item) for item in node]
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if not (key == "description" and isinstance(value, str))}
        return {key: without_descriptions(value) for key, value in kept.items()}
    return node


def main(folder: Path) -> None:
    """Write ``schemas/``."""
    for kind, name in KINDS.items():
        crd = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        schema = next(v for v in crd["spec"]["versions"] if v["name"] == VERSION)["schema"]["openAPIV3Schema"]
        text = json.dumps(without_descriptions(schema), sort_keys=True, separators=(",", ":"))
        # no time in it: the same CRD gives the same bytes
        schema_file(kind).write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
        print(schema_file(kind), len(text))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Each document against the schema of its kind. Unknown fields and kinds are errors: Kubernetes would drop the former
in silence."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]

from tests.manifests.crds import KINDS, SCHEMAS, VERSION, schema_file
from tests.manifests.documents import Document, name_of

_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _LABELS,
        "annotations": _LABELS,
    },
}
_KUBERAY = {(f"ray.io/{VERSION}", kind) for kind in KINDS}
_POD_MONITOR = ("monitoring.coreos.com/v1", "PodMonitor")


def schema_problems(document: Document) -> Iterator[str]:
    """What is wrong with ``document`` by its schema: KubeRay's, the Prometheus operator's, else Kubernetes' own."""
    kind = (document["apiVersion"], document["kind"])
    if kind in _KUBERAY or kind == _POD_MONITOR:
        for error in _validator(kind[1]).iter_errors(document):
            where = ".".join(map(str, error.absolute_path)) or "top level"
            yield f"{name_of(document)}: {where}: {error.message[:300]}"
    elif problem := _core_problem(json.dumps(document, sort_keys=True)):
        yield f"{name_of(document)}: {problem}"


@functools.cache
def _core_problem(text: str) -> str:
    """The first one. Cached, as overlays share most documents and each call reads a megabyte of definitions."""
    document = json.loads(text)
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return f"unknown kind: {document['apiVersion']}, {document['kind']}"
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message[:300]}"
    return ""


@functools.cache
def _validator(kind: str) -> jsonschema.Draft7Validator:
    if kind == "PodMonitor":
        schema = json.loads((SCHEMAS / "podmonitor.json").read_text(encoding="utf-8"))
    else:
        schema = strict(json.loads(gzip.decompress(schema_file(kind).read_bytes())))
    schema["properties"]["metadata"] = _METADATA
    return jsonschema.Draft7Validator(schema)


def strict(schema: Any) -> Any:
    """A CRD's structural schema as JSON Schema, in which what is not described is refused."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        pattern = {"pattern": schema["pattern"]} if "pattern" in schema else {}  # of quantities; asks texts only
        return {"type": ["integer", "string"], **pattern}
    result = {key: strict(value) for key, value in schema.items() if key != "format"}
    if schema.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        _close(schema, result)
    return result


def _close(schema: dict[str, Any], result: dict[str, Any]) -> None:
    """An object with known properties: no others, unless the CRD keeps them."""
    result["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
    if "required" in result:  # the API server fills defaults in before it validates
        result["required"] = [k for k in result["required"] if "default" not in schema["properties"].get(k, {})]
    if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
        result["additionalProperties"] = False

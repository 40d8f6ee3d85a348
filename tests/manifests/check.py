"""All of a folder of manifests: every kustomization rendered and checked, and no file that none of them uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.manifests.budgets import budget_problems
from tests.manifests.commands import command_problems
from tests.manifests.documents import Document, ManifestError
from tests.manifests.gateway import gateway_problems
from tests.manifests.kinds import schema_problems
from tests.manifests.kuberay import kuberay_problems
from tests.manifests.kustomize import FILE_NAME, Rendered, render
from tests.manifests.resources import resource_problems
from tests.manifests.secrets import secret_problems
from tests.manifests.security import security_problems
from tests.manifests.selectors import fence_problems, selector_problems
from tests.manifests.sizes import size_problems
from tests.manifests.traffic import traffic_problems


@dataclass(frozen=True)
class Report:
    """``documents``: how many were checked, of all kustomizations together."""

    documents: int
    problems: tuple[str, ...]


def check(folder: Path) -> Report:
    """Everything that can be said of ``folder`` without a cluster. To find nothing to check is a problem as well."""
    try:
        return _check(folder)
    except ManifestError as error:
        return Report(0, (str(error),))


def _check(folder: Path) -> Report:
    rendered = [render(path.parent) for path in sorted(folder.rglob(FILE_NAME))]
    problems = [*_orphans(folder, rendered)]
    for one in rendered:
        problems += [f"{one.folder}: {problem}" for document in one.documents for problem in schema_problems(document)]
    # what follows takes the shapes for granted, and then the numbers
    if not problems:
        problems += [f"{one.folder}: {problem}" for one in rendered for problem in resource_problems(one.documents)]
    if not problems:
        problems += _across(rendered)
    count = sum(len(one.documents) for one in rendered)
    return Report(count, tuple(dict.fromkeys(problems)) if count else (f"{folder}: nothing to check",))


def _orphans(folder: Path, rendered: list[Rendered]) -> Iterator[str]:
    used = {file for one in rendered for file in one.files}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.resolve() not in used:
            yield f"{path}: no kustomization uses it"


def _across(rendered: list[Rendered]) -> Iterator[str]:
    """Rules over a deployment: a kustomization with a RayCluster, and beside it each one without (jobs, monitors)."""
    for one in rendered:
        yield from (f"{one.folder}: {problem}" for problem in fence_problems(one.documents))
    addons = [one for one in rendered if not _has_cluster(one)]
    deployments = [one for one in rendered if _has_cluster(one)]
    if not deployments:
        yield "no kustomization has a RayCluster"
    for one in deployments:
        more: list[Document] = [document for addon in addons for document in addon.documents]
        everything = [*one.documents, *more]
        found = [*security_problems(everything), *selector_problems(everything), *budget_problems(everything)]
        found += [*command_problems(everything), *kuberay_problems(everything), *gateway_problems(one.documents)]
        found += [*traffic_problems(everything), *size_problems(everything), *secret_problems(everything)]
        yield from (f"{one.folder}: {problem}" for problem in found)


def _has_cluster(one: Rendered) -> bool:
    return any(document["kind"] == "RayCluster" for document in one.documents)

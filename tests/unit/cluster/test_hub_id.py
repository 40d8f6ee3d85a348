"""What a repository of the hub may be called."""

from __future__ import annotations

import pytest

from cluster.hub_id import HubId


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", "main"),
        ("deepseek-ai/DeepSeek-V2-Lite@v1.0", "deepseek-ai/DeepSeek-V2-Lite", "v1.0"),
        ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
    ],
)
def test_ids(text: str, repo: str, revision: str) -> None:
    assert HubId.parse(text) == HubId(repo, revision)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "a/b/c",
        "/a/b",
        "a/b@",
        "a/b@../../x",
        "a/..",
        "-a/b",
        "a/b-",
        "a b/c",
        "a/b--c",
        "a/b@-x",
        "a/" + "b" * 95,
    ],
)
def test_what_no_repository_is_called(text: str) -> None:
    assert HubId.parse(text) is None

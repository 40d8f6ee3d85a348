"""Models from a hub: what is fetched, what is not, and what is said when it cannot be."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from huggingface_hub import constants

from actors.model.weight_names import weight_names
from cluster import hub_cache
from cluster.config import ConfigError
from cluster.hub import Hub
from cluster.hub_errors import (
    AccessRefused,
    HubError,
    HubUnreachable,
    NoDiskSpace,
    NoSuchRepository,
    NoSuchRevision,
    NotACheckpoint,
    without_secrets,
)
from cluster.hub_id import HubId
from tests.hub_repository import INDEX, REPO, WANTED, A, B, files, index, names, repository
from tests.hub_server import HubServer, hub_server

TEXT = {"config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}


def test_only_what_a_checkpoint_needs_is_fetched(server: HubServer, hub: Hub) -> None:
    commit = server.publish("org/tiny", files())
    folder = hub.fetch(REPO)
    assert folder.name == commit
    assert names(folder) == WANTED
    assert (folder / A).read_bytes() == b"a" * 5000
    assert set(server.fetched()) == WANTED
    assert not any(".py" in path or "/original/" in path for path in server.asked)


def test_a_second_time_nothing_is_fetched(server: HubServer, hub: Hub) -> None:
    server.publish("org/tiny", files())
    first = hub.fetch(REPO)
    pinned = HubId("org/tiny", first.name)
    assert pinned.pinned
    server.asked.clear()
    assert hub.fetch(pinned) == first
    assert server.asked == [], "a commit does not change"
    assert hub.fetch(REPO) == first
    assert server.asked == ["GET /api/models/org/tiny/revision/main"]


def test_a_pinned_revision_stays_when_the_branch_moves(server: HubServer, hub: Hub) -> None:
    old = server.publish("org/tiny", files())
    pinned = hub.pin(REPO)
    assert pinned == HubId("org/tiny", old)
    assert server.fetched() == ["config.json"]
    new = server.publish("org/tiny", files(config__json=b"[]"))
    assert hub.fetch(pinned).name == old
    assert hub.fetch(REPO).name == new
    assert server.fetched().count(A) == 1, "what is the same in both is fetched once"


def test_branches_and_tags(server: HubServer, hub: Hub) -> None:
    server.publish("org/tiny", files())
    tagged = server.publish("org/tiny", files(config__json=b"[]"), revision="v2")
    assert hub.fetch(HubId("org/tiny", "v2")).name == tagged
    with pytest.raises(NoSuchRevision, match=r"org/tiny has no revision 'v3'"):
        hub.fetch(HubId("org/tiny", "v3"))
    with pytest.raises(NoSuchRevision, match="0" * 40):
        hub.fetch(HubId("org/tiny", "0" * 40))


def test_weights_by_the_loaders_rule() -> None:
    assert weight_names({"model.safetensors", A, "x.safetensors"}, None) == {"model.safetensors"}
    assert weight_names({"model.safetensors", A, B}, {"weight_map": {"a": A}}) == {"model.safetensors"}
    both = {"model.safetensors", A}
    assert weight_names({*both, B}, {"weight_map": {"a": A, "b": "model.safetensors"}}) == both
    assert weight_names({A, B, "x.safetensors"}, {"weight_map": {"a": A, "b": B}}) == {A, B}
    assert weight_names({A, B, "adapter_model.safetensors", "sub/x.safetensors"}, None) == {A, B}
    assert weight_names({"pytorch_model.bin"}, None) == frozenset()
    assert weight_names({A}, None) == {A, B}, "what a number promises has to be there"
    assert weight_names({A, B}, {"weight_map": {}}) == {A, B}


def test_who_may_not(server: HubServer, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server.publish("org/tiny", files())
    with pytest.raises(NoSuchRepository, match=r"no repository org/other at http://.* or it is private: then HF_TOKEN"):
        hub.fetch(HubId("org/other"))
    server.gated.add("org/tiny")
    with pytest.raises(AccessRefused, match=r"org/tiny@main is gated: ask for access at .*/org/tiny, and set HF_TOKEN"):
        hub.fetch(REPO)
    server.gated.clear()
    server.private.add("org/tiny")
    with pytest.raises(NoSuchRepository, match="HF_TOKEN"):
        hub.fetch(REPO)
    server.status = 403
    with pytest.raises(AccessRefused, match=r"http://.* refuses org/tiny@main \(403\): set HF_TOKEN"):
        hub.fetch(REPO)
    server.status = 503
    with pytest.raises(HubUnreachable, match="503"):
        hub.fetch(REPO)
    server.status = 0
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert names(hub.fetch(REPO)) == WANTED


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            {"config.json": b"{}", "pytorch_model-1.bin": b"p" * 999},
            r"only pickled weights \(pytorch_model-1\.bin, .*GiB",
        ),
        ({"config.json": b"{}", "README.md": b""}, r"has no \*\.safetensors"),
        ({"config.json": b"{}", "adapter_model.safetensors": b""}, r"has no \*\.safetensors"),
        ({"config.json": b"{}", "sub/model.safetensors": b""}, r"has no \*\.safetensors"),
        ({"model.safetensors": b""}, r"has no config\.json"),
        (
            {"config.json": b"{}", "tokenizer_config.json": b"{}", A: b"", B: b""},
            r"has no tokenizer\.json, without which it cannot be served",
        ),
        ({"config.json": b"{}", A: b"", B: b""}, r"has no tokenizer\.json and no tokenizer_config\.json, without"),
        ({**TEXT, A: b""}, rf"has no file '{B}', though others of the same series are there"),
        ({**TEXT, INDEX: index(a=A, b=B), A: b""}, rf"has no file '{B}', though its {INDEX} names it"),
    ],
)
def test_what_is_no_checkpoint_is_refused_before_weights_are_fetched(
    server: HubServer, hub: Hub, held: dict[str, bytes], message: str
) -> None:
    server.publish("org/tiny", held)
    with pytest.raises(NotACheckpoint, match=message):
        hub.fetch(REPO)
    assert not {name for name in server.fetched() if not name.endswith(".json")}


def test_what_is_told_of_a_name_that_may_be_a_path(
    server: HubServer, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "and there is no folder or file m/f0x here"
    nowhere = Hub("http://127.0.0.1:9", tmp_path / "other")
    with pytest.raises(NoSuchRepository, match=f"no repository m/f0x at .*, {hint}$"):
        hub.fetch_description(HubId("m/f0x"))
    with pytest.raises(HubUnreachable, match=f"not in the cache .* either, {hint}$"):
        nowhere.pin(HubId("m/f0x"))
    with pytest.raises(HubUnreachable, match=r"not in the cache [^,]* either$"):
        nowhere.fetch(HubId("m/f0x", "0" * 40))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "f0x").touch()
    with pytest.raises(NoSuchRepository, match=r"a token that may read it$"):
        hub.pin(HubId("m/f0x"))


def test_before_the_weights_the_rest_can_be_looked_at(server: HubServer, hub: Hub) -> None:
    """And refused; looked at once, and not again when all is there."""
    server.publish("org/tiny", files())
    seen: list[set[str]] = []

    def refuse(folder: Path) -> None:
        seen.append(names(folder))
        raise ConfigError("not this one")

    with pytest.raises(ConfigError, match="not this one"):
        hub.fetch(REPO, check=refuse)
    assert seen == [WANTED - {A, B}]
    assert not {A, B} & set(server.fetched())
    assert names(hub.fetch(REPO, check=lambda folder: seen.append(names(folder)))) == WANTED
    assert len(seen) == 2
    hub.fetch(REPO, check=refuse)


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"[]",
        b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
        b'{"weight_map": {"a": "../x.safetensors"}}',
        b'{"weight_map": {"a": "a.bin"}}',
    ],
)
def test_a_bad_index(server: HubServer, hub: Hub, bad: bytes) -> None:
    server.publish("org/tiny", {**files(), INDEX: bad})
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json: (is not a JSON object|names the file)"):
        hub.fetch(REPO)
    assert A not in server.fetched()


def test_a_full_disk_is_seen_before(server: HubServer, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish("org/tiny", files())
    first = sum(len(files()[name]) for name in (A, B))
    room = {"free": first - 1}
    usage = type("Usage", (), {"free": property(lambda _: room["free"])})
    monkeypatch.setattr(hub_cache.shutil, "disk_usage", lambda _: usage())
    with pytest.raises(NoDiskSpace, match=r"needs 0\.00 GiB more in .*cache.* HF_HOME or HF_HUB_CACHE"):
        hub.fetch(REPO)
    assert A not in server.fetched()
    room["free"] = first
    hub.fetch(REPO)
    # Of a new commit only what is new counts.
    server.publish("org/tiny", files(chat_template__jinja=b"yy"))
    room["free"] = 2
    assert names(hub.fetch(REPO)) == WANTED


class Unplugged:
    """A hub whose server has ended; the cache has what was fetched before."""

    def __init__(self, cache: Path) -> None:
        with hub_server() as server:
            server.publish("org/tiny", files())
            self.folder = Hub(server.url, cache).fetch(REPO)
        self.hub = Hub(server.url, cache)


def test_without_a_hub_the_cache_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unplugged = Unplugged(tmp_path)
    assert unplugged.hub.pin(REPO) == HubId("org/tiny", unplugged.folder.name)
    assert unplugged.hub.fetch(REPO, progress=True) == unplugged.folder
    assert "cannot be fetched" in (told := capsys.readouterr().err)
    assert told.endswith("from the cache\n")
    assert unplugged.hub.fetch(HubId("org/tiny", unplugged.folder.name)) == unplugged.folder
    for other in (HubId("org/other"), HubId("org/tiny", "v2"), HubId("org/tiny", "0" * 40)):
        with pytest.raises(HubUnreachable, match=r"Connection refused; org/.* is not in the cache .* either"):
            unplugged.hub.fetch(other)


def test_without_a_hub_a_snapshot_has_to_be_complete(tmp_path: Path) -> None:
    unplugged = Unplugged(tmp_path)
    (unplugged.folder / B).unlink()
    with pytest.raises(HubUnreachable, match=rf"Connection refused; the cache .* has it without {B}"):
        unplugged.hub.fetch(REPO)


def test_told_to_stay_offline_nothing_is_asked(
    server: HubServer,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.publish("org/tiny", files())
    folder = hub.fetch(REPO)
    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Hub(server.url, tmp_path / "cache").fetch(REPO, progress=True) == folder
    assert capsys.readouterr().err == f"note: taking org/tiny@{folder.name} from the cache (offline mode)\n"
    with pytest.raises(HubUnreachable, match=r"offline mode.*not in the cache"):
        hub.fetch(HubId("org/other"))
    assert server.asked == []


def test_a_cache_laid_out_by_others(tmp_path: Path) -> None:
    """By the layout's description: refs name commits, snapshots link to blobs."""
    commit = "c" * 40
    root = tmp_path / "models--org--tiny"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (root / part).mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, (name, data) in enumerate(
        dict.fromkeys(("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"), b"{}").items()
    ):
        (root / "blobs" / f"blob{number}").write_bytes(data)
        (root / "snapshots" / commit / name).symlink_to(f"../../blobs/blob{number}")
    hub = Hub("http://127.0.0.1:9", tmp_path)
    assert hub.fetch(REPO) == root / "snapshots" / commit
    (root / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(HubUnreachable, match=r"without model\.safetensors"):
        hub.fetch(REPO)
    (root / "snapshots" / commit / "model.safetensors").symlink_to("../../blobs/blob1")
    (root / "snapshots" / commit / "tokenizer.json").unlink()
    with pytest.raises(HubUnreachable, match=r"without tokenizer\.json"):
        hub.fetch(REPO)


def test_a_hub_that_refuses_does_not_matter_when_all_is_there(
    server: HubServer, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    pinned = HubId("org/tiny", server.publish("org/tiny", files()))
    folder = hub.fetch(pinned)
    server.private.add("org/tiny")
    assert hub.fetch(pinned) == folder
    for listed in (repository(hub) / "trees").iterdir():
        listed.unlink()
    assert hub.fetch(pinned) == folder, "also when the sizes are not known"
    assert hub.fetch_description(pinned) == (pinned, None, folder)
    (folder / B).unlink()
    with pytest.raises(NoSuchRepository, match=rf"HF_TOKEN.*; the cache .* has it without {B}"):
        hub.fetch(pinned)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", [A, INDEX, "tokenizer.json"])
def test_a_file_of_another_size_is_fetched_again(server: HubServer, hub: Hub, name: str, known: bool) -> None:
    pinned = HubId("org/tiny", server.publish("org/tiny", files()))
    folder = hub.fetch(pinned)
    if not known:
        for listed in (repository(hub) / "trees").iterdir():
            listed.unlink()
    (folder / name).write_bytes(b"")
    server.asked.clear()
    assert hub.fetch(pinned) == folder
    assert (folder / name).read_bytes() == files()[name]
    assert server.fetched() == [name]


def test_a_damaged_blob_is_not_taken_for_a_new_commit(server: HubServer, hub: Hub) -> None:
    folder = hub.fetch(HubId("org/tiny", server.publish("org/tiny", files())))
    (folder / A).write_bytes(b"a")
    folder = hub.fetch(HubId("org/tiny", server.publish("org/tiny", files(config__json=b"[]"))))
    assert (folder / A).read_bytes() == files()[A]


def test_without_a_hub_a_damaged_file_is_refused(tmp_path: Path) -> None:
    unplugged = Unplugged(tmp_path)
    (unplugged.folder / "tokenizer.json").write_bytes(b"")
    with pytest.raises(HubUnreachable, match=r"the cache .* has it without tokenizer\.json, or not whole"):
        unplugged.hub.fetch(REPO)


def test_what_does_not_come_as_it_was_listed(server: HubServer, hub: Hub) -> None:
    server.publish("org/tiny", files())
    server.sizes[A] = 5001
    with pytest.raises(HubError, match=rf"{A} did not come whole, expected 5001 bytes"):
        hub.fetch(REPO)


def test_a_mirror_that_tells_no_sizes(server: HubServer, hub: Hub) -> None:
    server.publish("org/tiny", files())
    server.untold = True
    assert names(hub.fetch(REPO)) == WANTED


def test_secrets_in_urls_are_not_told(tmp_path: Path) -> None:
    with hub_server() as server:
        address = server.url.replace("http://", "http://someone:passw@rd@")
        hub = Hub(address, tmp_path)
        server.status = 500
        with pytest.raises(HubUnreachable, match=r"http://127\.0\.0\.1:\d+: .*500") as told:
            hub.fetch(REPO)
        server.status = 403
        with pytest.raises(AccessRefused, match=r"http://127") as refused:
            hub.fetch(REPO)
        server.status = 0
        server.publish("org/tiny", files())
        server.gated.add("org/tiny")
        with pytest.raises(AccessRefused, match=r"ask for access at http://127") as gated:
            hub.fetch(REPO)
    for error in (told, refused, gated):
        shown = "".join(traceback.format_exception(error.value))
        assert "someone" not in shown
        assert "passw" not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("for url 'https://cdn.x/a/b?X-Signature=s&y=z'. More", "for url 'https://cdn.x/a/b'. More"),
        ("(http://u:p@h:1/a?b, https://h/c#d) why?", "(http://h:1/a https://h/c why?"),
        ("no URL: user@host, is it?", "no URL: user@host, is it?"),
    ],
)
def test_texts_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_who_is_no_hub(hub: Hub, server: HubServer) -> None:
    server.publish("org/tiny", files())
    server.garbled = True
    with pytest.raises(HubError, match=r"org/tiny@main at http"):
        hub.fetch(REPO)

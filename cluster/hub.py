"""Checkpoints from the Hugging Face hub, through its cache on this machine.

``huggingface_hub`` reads HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE; it is imported when a
repository is asked for, not before. Repositories' code is neither fetched nor run.
"""

from __future__ import annotations

import errno
import glob
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from cluster.hub_files import (
    CONFIG,
    INDEX,
    Listing,
    RepoFile,
    companions,
    missing_weights,
    pickles,
    read_index,
    weight_names,
)

_ASK_TIMEOUT_S = 15.0
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/+-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_ID = 96


class HubError(ConfigError):
    """A repository cannot be used. The message names it, what is wrong, and what can be done."""


class NoSuchRepository(HubError):
    """There is none of that name, or none that this token may know of."""


class NoSuchRevision(HubError):
    """The repository has no such branch, tag or commit."""


class AccessRefused(HubError):
    """The repository is gated or private, and the token, if there is one, does not open it."""


class HubUnreachable(HubError):
    """Neither does the hub answer nor does the cache have all that is needed."""


class NotACheckpoint(HubError):
    """The repository has no config.json or no safetensors."""


class NoDiskSpace(HubError):
    """The cache's disk has less room than the files need."""


@dataclass(frozen=True, slots=True)
class HubId:
    """``org/name@revision``; the revision is a branch, a tag, or a commit (40 hex digits: then it is *pinned*)."""

    repo: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """None for what cannot be one."""
        match = _ID.fullmatch(text)
        if match is None or ".." in text or "--" in match["repo"] or len(match["repo"]) > _LONGEST_ID:
            return None
        return cls(match["repo"], match["revision"] or "main")

    @property
    def pinned(self) -> bool:
        """Whether it always means the same files."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


class Hub:
    """The hub at ``endpoint`` with the cache in ``cache``; None: what the environment says."""

    def __init__(self, endpoint: str | None = None, cache: Path | None = None) -> None:
        from huggingface_hub import constants

        self._endpoint = endpoint
        self._cache = Path(cache or constants.HF_HUB_CACHE)
        self._address = endpoint or constants.ENDPOINT

    def pin(self, wanted: HubId) -> HubId:
        """The same at the commit that the revision means now; when the hub does not answer, what it meant last."""
        if wanted.pinned:
            return wanted
        try:
            self._refuse_unusable(wanted, self.listing(wanted))
        except HubUnreachable as error:
            return replace(wanted, revision=self._cached_config(wanted, error).parent.name)
        # By the revision's name: so the cache learns what it means, for when the hub does not answer.
        return replace(wanted, revision=self._file(wanted, CONFIG).parent.name)

    def fetch(self, wanted: HubId, progress: bool = False) -> Path:
        """The folder of the checkpoint in the cache, after downloading what is not there yet.

        When the hub does not answer, a snapshot that is there with all its weights is taken. ``progress``: say on
        stderr what is done. Raises HubError.
        """
        wanted = self.pin(wanted)
        try:
            listing = self.listing(wanted)
        except HubUnreachable as error:
            folder = self._cached_config(wanted, error).parent
            if missing := missing_weights(folder):
                raise HubUnreachable(f"{error}; the cache {self._cache} has it without {missing[0]}") from error
            if progress:
                print(f"{error}; taking {wanted} from the cache", file=sys.stderr)
            return folder
        self._refuse_unusable(wanted, listing)
        names = self._needed(wanted, listing)
        folder = self._storage(wanted) / "snapshots" / listing.commit
        missing = [name for name in names if not (folder / name).exists()]
        if not missing:
            return folder
        self._check_room(wanted, listing, missing)
        if progress:
            what = f"{len(missing)} of {len(names)} files, {listing.size(missing) / 2**30:.2f} GiB"
            print(f"fetching {wanted}: {what}, from {self._address} into {self._cache}", file=sys.stderr)
        return self._download(wanted, missing, progress)

    def fetch_description(self, wanted: HubId) -> tuple[HubId, Listing | None, Path]:
        """What can be known without the weights: the pinned id, what the repository holds (None when the hub does not
        answer), and a folder with its config.json and, if it has one, its index. Raises HubError."""
        wanted = self.pin(wanted)
        try:
            listing = self.listing(wanted)
        except HubUnreachable as error:
            return wanted, None, self._cached_config(wanted, error).parent
        if INDEX in listing.names:
            self._file(wanted, INDEX)
        return wanted, listing, self._file(wanted, CONFIG).parent

    def listing(self, wanted: HubId) -> Listing:
        """Ask the hub what the repository holds. Raises HubError."""
        from huggingface_hub import HfApi

        with self._explained(wanted):
            info = HfApi(endpoint=self._endpoint).model_info(
                wanted.repo, revision=wanted.revision, files_metadata=True, timeout=_ASK_TIMEOUT_S
            )
        files = {}
        for entry in info.siblings or []:
            blob = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            files[entry.rfilename] = RepoFile(entry.size or 0, blob or "")
        return Listing(str(info.sha), files)

    def _refuse_unusable(self, wanted: HubId, listing: Listing) -> None:
        """Before anything large is fetched."""
        names = listing.names
        if CONFIG not in names:
            raise NotACheckpoint(f"model: {wanted} has no {CONFIG}: it is no checkpoint of transformers' layout")
        if INDEX in names or weight_names(names, None):
            return
        if found := pickles(names):
            raise NotACheckpoint(
                f"model: {wanted} has only pickled weights ({found[0]}, {listing.size(found) / 2**30:.2f} GiB in all), "
                "which are never read: choose a revision with safetensors, or convert them"
            )
        raise NotACheckpoint(f"model: {wanted} has no *.safetensors")

    def _needed(self, wanted: HubId, listing: Listing) -> list[str]:
        """Names of the files to have, sorted; fetches the index, if there is one, to know."""
        names = listing.names
        index = read_index(self._file(wanted, INDEX)) if INDEX in names else None
        weights = weight_names(names, index)
        if absent := sorted(weights - names):
            raise NotACheckpoint(f"model: {wanted} has no file {absent[0]!r}, though its {INDEX} names it")
        return sorted(weights | companions(names))

    def _check_room(self, wanted: HubId, listing: Listing, missing: list[str]) -> None:
        blobs = self._storage(wanted) / "blobs"
        needed = listing.size([name for name in missing if not (blobs / listing.files[name].blob).is_file()])
        there = next(folder for folder in (self._cache, *self._cache.absolute().parents) if folder.is_dir())
        if (free := shutil.disk_usage(there).free) < needed:
            raise NoDiskSpace(
                f"model: {wanted} needs {needed / 2**30:.2f} GiB more in {self._cache}, where {free / 2**30:.2f} "
                "GiB are free; HF_HOME or HF_HUB_CACHE name another folder"
            )

    def _download(self, wanted: HubId, names: list[str], progress: bool) -> Path:
        """In a thread of its own: a signal that ends the wait for it ends it too, within the next piece of a file."""
        from huggingface_hub import snapshot_download

        abandoned = threading.Event()
        with self._explained(wanted), ThreadPoolExecutor(1, thread_name_prefix="hub") as pool:
            running = pool.submit(
                snapshot_download,
                wanted.repo,
                revision=wanted.revision,
                cache_dir=self._cache,
                endpoint=self._endpoint,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=_bars(progress, abandoned),
            )
            try:
                return Path(running.result())
            finally:
                abandoned.set()

    def _file(self, wanted: HubId, name: str) -> Path:
        """One small file, from the cache if it is there."""
        from huggingface_hub import hf_hub_download

        with self._explained(wanted):
            return Path(
                hf_hub_download(
                    wanted.repo,
                    name,
                    revision=wanted.revision,
                    cache_dir=self._cache,
                    endpoint=self._endpoint,
                    tqdm_class=_bars(False, threading.Event()),
                )
            )

    def _cached_config(self, wanted: HubId, why: HubUnreachable) -> Path:
        """The config.json of the snapshot in the cache. HubUnreachable if it is not there."""
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(wanted.repo, CONFIG, cache_dir=self._cache, revision=wanted.revision)
        if not isinstance(config, str):
            raise HubUnreachable(f"{why}; {wanted} is not in the cache {self._cache} either") from why
        return Path(config)

    def _storage(self, wanted: HubId) -> Path:
        return self._cache / f"models--{wanted.repo.replace('/', '--')}"

    @contextmanager
    def _explained(self, wanted: HubId) -> Iterator[None]:
        """huggingface_hub's errors as ours."""
        from huggingface_hub import errors

        try:
            yield
        # Order matters: GatedRepoError is a RepositoryNotFoundError, and all of them are HTTPErrors and OSErrors.
        except errors.GatedRepoError as error:
            raise AccessRefused(
                f"model: {wanted} is gated: ask for access at {self._address}/{wanted.repo}, and set HF_TOKEN to the "
                "token of an account that has it"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise NoSuchRepository(
                f"model: there is no repository {wanted.repo} at {self._address}, or it is private: then HF_TOKEN has "
                "to be set to a token that may read it"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise NoSuchRevision(f"model: {wanted.repo} has no revision {wanted.revision!r}") from error
        except errors.HTTPError as error:  # of the HTTP client that this release of huggingface_hub uses
            raise self._http_error(wanted, error) from error
        except errors.LocalEntryNotFoundError as error:
            raise self._http_error(wanted, error.__cause__ or error) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise NoDiskSpace(f"model: {wanted}: the disk of {self._cache} is full") from error
            if isinstance(error, ConnectionError):
                raise self._http_error(wanted, error) from error
            raise HubError(f"model: {wanted} cannot be fetched into {self._cache}: {error}") from error
        except ValueError as error:  # an id that it refuses, or an answer that is not JSON
            raise HubError(f"model: {wanted} at {self._address}: {error}") from error

    def _http_error(self, wanted: HubId, error: BaseException) -> HubError:
        """For what has no type of its own: refused by status, else the hub is not there."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return AccessRefused(
                f"model: {self._address} refuses {wanted} ({status}): set HF_TOKEN to a token that may read it"
            )
        reason = " ".join(str(error).split()) or type(error).__name__
        return HubUnreachable(f"model: {wanted} cannot be fetched from {self._address}: {reason}")


class _AbandonedError(RuntimeError):
    """Nobody waits for this download any more."""


def _bars(shown: bool, abandoned: threading.Event) -> type[Any]:
    """huggingface_hub's progress bars, on a terminal and if ``shown``; they end a download that was abandoned."""
    from huggingface_hub.utils import tqdm

    class Bars(tqdm):
        def __init__(self, *args: Any, **keys: Any) -> None:
            super().__init__(*args, **{"disable": None, **keys} if shown else {**keys, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            """Also called, if nothing is shown, for each piece that came."""
            if abandoned.is_set():
                raise _AbandonedError
            return super().update(n)

    return Bars

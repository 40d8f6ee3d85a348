"""Checkpoints from the Hugging Face hub, through its cache on this machine.

``huggingface_hub`` reads HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE; it is imported when a
repository is asked for, not before. Repositories' code is neither fetched nor run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from actors.model.weight_names import INDEX, pickles, weight_names
from cluster.hub_cache import HubCache
from cluster.hub_download import download
from cluster.hub_errors import (
    HubError,
    HubOffline,
    HubUnreachable,
    NoDiskSpace,
    NotACheckpoint,
    explained,
    none_here,
    without_secrets,
)
from cluster.hub_files import CONFIG, TOKENIZER, Listing, RepoFile, companions, missing_weights, read_index
from cluster.hub_id import HubId

_ASK_TIMEOUT_S = 15.0


class Hub:
    """The hub at ``endpoint`` with the cache in ``cache``; None: what the environment says."""

    def __init__(self, endpoint: str | None = None, cache: Path | None = None) -> None:
        from huggingface_hub import constants

        self._endpoint = endpoint
        self._cache = HubCache(Path(cache or constants.HF_HUB_CACHE))
        self._address = without_secrets(endpoint or constants.ENDPOINT)

    def pin(self, wanted: HubId, progress: bool = False) -> HubId:
        """The same at the commit that the revision means now; when the hub does not answer, what it meant last.

        ``progress``: say on stderr when that is so. Raises HubError.
        """
        if wanted.pinned:
            return wanted
        try:
            listing = self.listing(wanted)
        except HubUnreachable as error:
            known = self._cache.known(wanted)
            if known is None:
                raise self._nowhere(wanted, error) from error
            if progress:
                _say_taken(known, error)
            return known
        self._refuse_unusable(wanted, listing)
        pinned = replace(wanted, revision=listing.commit)
        if self._cache.known(wanted) == pinned:
            return pinned
        # By the revision's name: so the cache learns what it means, for when the hub does not answer.
        return replace(wanted, revision=self._download(wanted, listing, [CONFIG]).name)

    def fetch(self, wanted: HubId, progress: bool = False, check: Callable[[Path], None] | None = None) -> Path:
        """The folder of the checkpoint in the cache, after downloading what is not there yet, or not whole.

        A commit does not change: if the cache has all of it, and knows the files' sizes, nobody is asked; if it does
        not know them, and the hub does not tell, what is there is taken. ``progress``: say on stderr what is done.
        ``check`` gets the folder when all but the weights is in it, and may raise, before weights are fetched.
        Raises HubError.
        """
        wanted = self.pin(wanted, progress)
        absent = self._absent(wanted)
        if absent == []:
            return self._cache.snapshot(wanted)
        try:
            listing = self.listing(wanted)
        except HubError as error:
            folder = self._unasked(wanted, absent, error)
            if progress:
                _say_taken(wanted, error)
            return folder
        self._refuse_unservable(wanted, listing)
        folder = self._have(wanted, listing, sorted(companions(listing.names)))
        needed = self._needed(wanted, listing)
        if check is not None:
            check(folder)
        return self._have(wanted, listing, needed, progress)

    def fetch_description(self, wanted: HubId) -> tuple[HubId, Listing | None, Path]:
        """What can be known without the weights: the pinned id, what the repository holds (None when the hub does not
        tell), and a folder with its config.json and, if it has one, its index. Raises HubError."""
        wanted = self.pin(wanted)
        try:
            listing = self.listing(wanted)
        except HubError as error:
            return wanted, None, self._described(wanted, error)
        self._refuse_unusable(wanted, listing)
        return wanted, listing, self._have(wanted, listing, sorted({CONFIG, INDEX} & listing.names))

    def listing(self, wanted: HubId) -> Listing:
        """Ask the hub what the repository holds. Raises HubError."""
        from huggingface_hub import HfApi

        with explained(wanted, self._address, self._cache.root):
            info = HfApi(endpoint=self._endpoint).model_info(
                wanted.repo, revision=wanted.revision, files_metadata=True, timeout=_ASK_TIMEOUT_S
            )
        files = {}
        for entry in info.siblings or []:
            blob = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            files[entry.rfilename] = RepoFile(entry.size, blob or "")
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

    def _refuse_unservable(self, wanted: HubId, listing: Listing) -> None:
        """Also what can be looked at, but not served."""
        self._refuse_unusable(wanted, listing)
        if absent := [name for name in TOKENIZER if name not in listing.names]:
            raise NotACheckpoint(f"model: {wanted} has no {' and no '.join(absent)}, without which it cannot be served")

    def _needed(self, wanted: HubId, listing: Listing) -> list[str]:
        """Names of the files to have, sorted. The index, if the repository has one, has to be in the cache."""
        names = listing.names
        index = read_index(self._cache.snapshot(wanted) / INDEX) if INDEX in names else None
        weights = weight_names(names, index)
        if absent := sorted(weights - names):
            told = f"its {INDEX} names it" if index else "others of the same series are there"
            raise NotACheckpoint(f"model: {wanted} has no file {absent[0]!r}, though {told}")
        return sorted(weights | companions(names))

    def _have(self, wanted: HubId, listing: Listing, names: list[str], progress: bool = False) -> Path:
        """The folder of the snapshot, after fetching those of ``names`` that it has not, or not whole."""
        folder = self._cache.snapshot(wanted)
        lacking = listing.lacking(folder, names)
        if not lacking:
            return folder
        self._cache.drop_damaged(wanted, listing, lacking)
        self._check_room(wanted, listing, lacking)
        if progress:
            what = f"{len(lacking)} of {len(names)} files, {listing.size(lacking) / 2**30:.2f} GiB"
            print(f"fetching {wanted}: {what}, from {self._address} into {self._cache.root}", file=sys.stderr)
        self._download(wanted, listing, lacking, progress)
        if lacking := listing.lacking(folder, lacking):
            size = listing.files[lacking[0]].size
            raise HubUnreachable(
                f"model: {wanted} cannot be fetched from {self._address}: {lacking[0]} did not come whole, expected "
                f"{size} bytes"
            )
        return folder

    def _download(self, wanted: HubId, listing: Listing, names: list[str], progress: bool = False) -> Path:
        self._cache.drop_parts(wanted, listing, names)
        try:
            return download(wanted, names, self._cache.root, self._endpoint, progress)
        finally:
            self._cache.drop_parts(wanted, listing, names)

    def _check_room(self, wanted: HubId, listing: Listing, lacking: list[str]) -> None:
        needed, free = self._cache.bytes_needed(wanted, listing, lacking), self._cache.bytes_free()
        if free < needed:
            raise NoDiskSpace(
                f"model: {wanted} needs {needed / 2**30:.2f} GiB more in {self._cache.root}, where {free / 2**30:.2f} "
                "GiB are free; HF_HOME or HF_HUB_CACHE name another folder"
            )

    def _absent(self, wanted: HubId) -> list[str] | None:
        """What the cache lacks of a commit or has not whole, by what was listed at its fetch; None: that is not known.

        Raises NotACheckpoint.
        """
        listing, folder = self._cache.listing(wanted), self._cache.snapshot(wanted)
        if listing is None:
            return None
        self._refuse_unservable(wanted, listing)
        described = listing.lacking(folder, sorted({CONFIG, INDEX} & listing.names))
        return described or listing.lacking(folder, self._needed(wanted, listing))

    def _unasked(self, wanted: HubId, absent: list[str] | None, why: HubError) -> Path:
        """The folder of a commit's snapshot of which nothing is absent; else raises HubError. When sizes are not known,
        it needs at least the tokenizer and all weights."""
        folder = self._described(wanted, why)
        if absent is None:
            absent = [name for name in TOKENIZER if not (folder / name).is_file()] or missing_weights(folder)
        if absent:
            raise type(why)(f"{why}; the cache {self._cache.root} has it without {absent[0]}, or not whole") from why
        return folder

    def _described(self, wanted: HubId, why: HubError) -> Path:
        """The folder of a commit's snapshot that has at least its config.json; else raises HubError."""
        if (self._cache.snapshot(wanted) / CONFIG).is_file():
            return self._cache.snapshot(wanted)
        raise self._nowhere(wanted, why) if isinstance(why, HubUnreachable) else why

    def _nowhere(self, wanted: HubId, why: HubUnreachable) -> HubUnreachable:
        return HubUnreachable(f"{why}; {wanted} is not in the cache {self._cache.root} either{none_here(wanted)}")


def _say_taken(known: HubId, why: HubError) -> None:
    """On stderr: that the cache is used, and why the hub is not."""
    if isinstance(why, HubOffline):
        print(f"note: taking {known} from the cache (offline mode)", file=sys.stderr)
    else:
        print(f"note: {why}; taking {known} from the cache", file=sys.stderr)

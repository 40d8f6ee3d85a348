"""The cache of huggingface_hub on this machine, as far as a checkpoint's files are concerned.

Layout: ``models--ORG--NAME/`` with ``refs/REVISION`` (a commit), ``snapshots/COMMIT/FILE`` (links) and ``blobs/ETAG``,
and ``.locks/models--ORG--NAME/ETAG.lock``, held by whoever fetches that blob
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.hub_files import CONFIG, Listing, RepoFile
from cluster.hub_id import HubId


@dataclass(frozen=True, slots=True)
class HubCache:
    """What is in ``root``; nothing here asks the hub."""

    root: Path

    def snapshot(self, wanted: HubId) -> Path:
        """The folder of a commit's files, there or not."""
        return self._storage(wanted) / "snapshots" / wanted.revision

    def known(self, wanted: HubId) -> HubId | None:
        """The commit that the cache last learnt for a revision, if it has the config.json of it."""
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(wanted.repo, CONFIG, cache_dir=self.root, revision=wanted.revision)
        return replace(wanted, revision=Path(config).parent.name) if isinstance(config, str) else None

    def listing(self, wanted: HubId) -> Listing | None:
        """What the hub told of a commit when files of it were fetched, by whomever; None if that was not kept."""
        from huggingface_hub import errors, get_cached_repo_tree

        try:
            tree = get_cached_repo_tree(wanted.repo, revision=wanted.revision, cache_dir=self.root)
        except errors.CachedRepoTreeNotFoundError:
            return None
        return Listing(wanted.revision, {entry.path: RepoFile(entry.size, "") for entry in tree})

    def drop_damaged(self, wanted: HubId, listing: Listing, names: Collection[str]) -> None:
        """Files of another size than listed: what is there under its right name would never be fetched again."""
        for name in names:
            for path in (self.snapshot(wanted) / name, self._blob(wanted, listing, name)):
                if listing.damaged(path, name):
                    path.unlink()

    def drop_parts(self, wanted: HubId, listing: Listing, names: Collection[str]) -> None:
        """Parts of files whose download was broken off: nobody goes on with them. Those of running ones are locked."""
        locks = self.root / ".locks" / self._storage(wanted).name
        for blob in {self._blob(wanted, listing, name) for name in names}:
            for part in blob.parent.glob(f"{blob.name}.*.incomplete"):
                locks.mkdir(parents=True, exist_ok=True)
                with (locks / f"{blob.name}.lock").open("a") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except OSError:  # somebody has it, or this file system knows no locks
                        continue
                    part.unlink(missing_ok=True)

    def bytes_needed(self, wanted: HubId, listing: Listing, names: Collection[str]) -> int:
        """Of those of ``names`` whose content is not here, also not for another commit."""
        return listing.size([name for name in names if not self._blob(wanted, listing, name).is_file()])

    def bytes_free(self) -> int:
        """On the disk on which the cache is, or will be."""
        there = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(there).free

    def _blob(self, wanted: HubId, listing: Listing, name: str) -> Path:
        return self._storage(wanted) / "blobs" / listing.files[name].blob

    def _storage(self, wanted: HubId) -> Path:
        return self.root / f"models--{wanted.repo.replace('/', '--')}"

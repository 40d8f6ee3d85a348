"""One batch on disk: the input, the results so far, and the manifest that ties them together."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from cluster.batch.errors import BatchError, Changed
from cluster.batch.manifest import Manifest, differences, manifest_path, read_manifest, write_manifest
from cluster.batch.results import ResultFile
from cluster.batch.rows import BadRow, Input, Row, check_input, read_rows
from cluster.batch.seeds import batch_seed
from cluster.batch.tally import Tally


@dataclass(frozen=True)
class Wanted:
    """What the user asks for. ``seed`` None: as before, else the input's own. ``accept_changes``: go on although the
    input, the model or the seed is another one. ``retry_failed``: forget the failed rows, so that they are redone."""

    seed: int | None = None
    accept_changes: bool = False
    retry_failed: bool = False


def errors_path(output: Path) -> Path:
    """Where the rows go that failed for good."""
    return output.with_name(output.name + ".errors.jsonl")


class Job:
    """``results`` has the rows that were answered, ``errors`` those that failed for good; no row is in both."""

    def __init__(self, given: Input, file: BinaryIO, results: ResultFile, errors: ResultFile, wanted: Wanted) -> None:
        self.results = results
        self.errors = errors
        self._given = given
        self._file = file
        self._wanted = wanted
        self._begun = self._read_manifest()
        self.notes = [
            f"{part.path}: cut off {torn} bytes of a line that was not complete"
            for part in (results, errors)
            if (torn := part.repair())
        ]
        answered = results.finished()
        failed = errors.finished() - answered
        self._finished = answered | (set() if wanted.retry_failed else failed)
        self.tally = Tally(
            len(given.keys), len(given.keys & answered), 0 if wanted.retry_failed else len(given.keys & failed)
        )

    def begin(self, model: dict[str, Any]) -> Manifest:
        """Tie the output to the input and to ``model`` (see describe_model), on disk. From then on rows may be sent.

        Raises Changed unless that was accepted, and BatchError for a disk that does not take it.
        """
        manifest = self._manifest(model)
        try:
            if manifest != self._begun:
                write_manifest(manifest_path(self.results.path), manifest)
            if self._wanted.retry_failed:
                self.errors.clear()
        except OSError as error:
            raise BatchError(f"{error.filename or manifest_path(self.results.path)}: {error.strerror}") from None
        return manifest

    def pending(self, enough: threading.Event) -> Iterator[Row]:
        """Rows without a result, in the order of the input; no more once ``enough`` is set. Raises BatchError when its
        rows are not those that were checked any more, or cannot be read."""
        try:
            for key, row in read_rows(self._file, self._given):
                if enough.is_set():
                    return
                if key not in self._finished:
                    yield row
        except BadRow as error:
            raise BatchError(f"{self._file.name}: was changed while the batch ran: {error}") from None
        except OSError as error:
            raise BatchError(f"{self._file.name}: cannot be read: {error.strerror}") from None

    def _read_manifest(self) -> Manifest | None:
        """The one that the results belong to; None if there is none. Raises BatchError and Changed."""
        begun = read_manifest(manifest_path(self.results.path))
        if begun is not None and not self._has_results and begun.input != self._given.identity:
            return None  # of another batch, of which nothing is left
        if begun is not None and not self._may_change:
            # the model is compared when it is known; the rest before anything is sent
            changed = differences(begun, self._manifest_after(begun, begun.model))
            if changed:
                raise Changed(str(self.results.path), changed)
        return begun

    @property
    def _has_results(self) -> bool:
        return bool(self.results.size or self.errors.size)

    @property
    def _may_change(self) -> bool:
        """Where there are no results there is nothing to be mixed; what was asked for when it began still holds."""
        return self._wanted.accept_changes or not self._has_results

    def _manifest(self, model: dict[str, Any]) -> Manifest:
        if self._begun is not None:
            now = self._manifest_after(self._begun, model)
            changed = differences(self._begun, now)
            if changed and not self._may_change:
                raise Changed(str(self.results.path), changed)
            return now if changed else self._begun
        seed = self._wanted.seed
        identity = self._given.identity
        return Manifest(
            batch=uuid.uuid4().hex,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            expertmesh=version("expertmesh"),
            seed=batch_seed(identity.sha256) if seed is None else seed,
            input=identity,
            model=model,
        )

    def _manifest_after(self, begun: Manifest, model: dict[str, Any]) -> Manifest:
        seed = begun.seed if self._wanted.seed is None else self._wanted.seed
        return replace(begun, seed=seed, input=self._given.identity, model=model)


@contextmanager
def open_job(input_path: Path, output: Path, wanted: Wanted) -> Iterator[Job]:
    """Check the whole input, lock and repair the results. Raises BatchError and its kinds; then nothing was changed
    but the torn end of a result file."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_open_input(input_path))
            if output.exists() and os.path.samefile(input_path, output):
                raise BatchError(f"{output}: is the input")
            given = check_input(str(input_path), file)
            results = stack.enter_context(contextlib.closing(ResultFile(output)))
            _refuse_foreign(output)
            errors = stack.enter_context(contextlib.closing(ResultFile(errors_path(output))))
            job = Job(given, file, results, errors, wanted)
        except OSError as error:
            raise BatchError(f"{error.filename or output}: {error.strerror}") from None
        yield job


def _refuse_foreign(output: Path) -> None:
    """Raises BatchError for files with content that no batch has written."""
    manifest = manifest_path(output)
    for path in (output, errors_path(output)):
        if not manifest.exists() and path.exists() and path.stat().st_size:
            raise BatchError(
                f"{path}: is no output of a batch (there is no {manifest.name}), and was left alone: choose another "
                "output (-o)"
            )


def _open_input(path: Path) -> BinaryIO:
    """Raises BatchError for what cannot be read twice, and OSError."""
    if str(path) == "-" or (path.exists() and not path.is_file()):
        raise BatchError(f"{path}: allowed is a regular file; it is read more than once")
    return path.open("rb")

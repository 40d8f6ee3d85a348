"""What can be wrong with a repository, and huggingface_hub's errors in these terms."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.config import ConfigError
from cluster.hub_id import HubId

_USER = re.compile(r"(\w://)[^/\s'\"<>]*@")
_QUERY = re.compile(r"(\w://[^\s'\"<>?#]+)[?#][^\s'\"<>]*")


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


class HubOffline(HubUnreachable):
    """The hub is not to be asked: HF_HUB_OFFLINE is set."""


class NotACheckpoint(HubError):
    """The repository has no config.json, no safetensors, or no tokenizer."""


class NoDiskSpace(HubError):
    """The cache's disk has less room than the files need."""


def without_secrets(text: str) -> str:
    """``text`` without what its URLs may hide: users' names and passwords, and queries, in which signatures are."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


def none_here(wanted: HubId) -> str:
    """What to add where a repository is not found: its name may have been meant as a path. Nothing for a commit: that
    names a repository for certain."""
    if wanted.pinned or Path(wanted.repo).exists():
        return ""
    return f", and there is no folder or file {wanted.repo} here"


@contextmanager
def explained(wanted: HubId, address: str, cache: Path) -> Iterator[None]:
    """huggingface_hub's errors as ours. ``address``: the hub's, as it may be shown; ``cache``: where files go.

    They are raised without their cause, whose text may hold secrets that the traceback would show.
    """
    from huggingface_hub import errors

    try:
        yield
    # Order matters: GatedRepoError is a RepositoryNotFoundError, and all of them are HTTPErrors and OSErrors.
    except errors.GatedRepoError:
        raise AccessRefused(
            f"model: {wanted} is gated: ask for access at {address}/{wanted.repo}, and set HF_TOKEN to the token of an "
            "account that has it"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NoSuchRepository(
            f"model: there is no repository {wanted.repo} at {address}, or it is private: then HF_TOKEN has to be set "
            f"to a token that may read it{none_here(wanted)}"
        ) from None
    except errors.RevisionNotFoundError:
        raise NoSuchRevision(f"model: {wanted.repo} has no revision {wanted.revision!r}") from None
    except errors.OfflineModeIsEnabled:
        text = f"model: {wanted} cannot be fetched from {address}: offline mode is enabled (HF_HUB_OFFLINE)"
        raise HubOffline(text) from None
    except errors.HTTPError as error:  # of the HTTP client that this release of huggingface_hub uses
        raise _http_error(wanted, address, error) from None
    except errors.LocalEntryNotFoundError as error:
        raise _http_error(wanted, address, error.__cause__ or error) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoDiskSpace(f"model: {wanted}: the disk of {cache} is full") from None
        if isinstance(error, ConnectionError):
            raise _http_error(wanted, address, error) from None
        raise HubError(f"model: {wanted} cannot be fetched into {cache}: {without_secrets(str(error))}") from None
    except ValueError as error:  # an id that it refuses, or an answer that is not JSON
        raise HubError(f"model: {wanted} at {address}: {without_secrets(str(error))}") from None


def _http_error(wanted: HubId, address: str, error: BaseException) -> HubError:
    """For what has no type of its own: refused by status, else the hub is not there."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return AccessRefused(f"model: {address} refuses {wanted} ({status}): set HF_TOKEN to a token that may read it")
    reason = without_secrets(" ".join(str(error).split())) or type(error).__name__
    return HubUnreachable(f"model: {wanted} cannot be fetched from {address}: {reason}")

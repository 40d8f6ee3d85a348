"""Downloads from the hub, each in a process of its own: it ends when its owner ends or waits no longer.

Nothing less stops one: a thread that waits for a silent server hears of nothing, and hf_xet's threads, which bring what
is stored with Xet, print and forget whatever its progress callback raises.
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.hub_errors import HubError, explained, without_secrets
from cluster.hub_id import HubId

_KINDS: list[type[HubError]] = [HubError, *HubError.__subclasses__()]
_ERRORS = {kind.__name__: kind for kind in _KINDS}
_LAST_WORDS_S = 5.0


def download(wanted: HubId, names: Collection[str], cache: Path, endpoint: str | None, progress: bool) -> Path:
    """Fetch these files of a repository into ``cache``; the folder of its snapshot there.

    Files that the cache has are not fetched. ``progress``: with bars, if stderr is a terminal. Whatever is raised while
    waiting, as by a signal's handler, ends the download; parts of files may be left in the cache. Raises HubError.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": _search_path()},
        start_new_session=True,  # a terminal's Ctrl-C is its owner's to handle
    )
    try:
        answer = _ask(process, [wanted.repo, wanted.revision, sorted(names), str(cache), endpoint, progress])
    finally:
        _end(process)
    if not answer:
        raise HubError(f"model: the download of {wanted} ended with status {process.returncode}; see above")
    told = json.loads(answer.splitlines()[-1])
    if "error" in told:
        raise _ERRORS[told["error"]](told["message"])
    return Path(told["folder"])


def _search_path() -> str:
    """For the process to find this package, and in its environment whatever the owner's names."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))


def _ask(process: subprocess.Popen[bytes], request: list[Any]) -> bytes:
    """What the process says before it ends. Its stdin stays open: the end of that tells it to leave."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # ended already: then nothing is answered
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    return process.stdout.read()


def _end(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            stream.close()  # type: ignore[union-attr]
    try:
        process.wait(_LAST_WORDS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    """In the process: read the request, fetch, and answer with one line of JSON."""
    repo, revision, names, cache, endpoint, progress = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_owner, name="owner", daemon=True).start()
    try:
        told = {"folder": _fetch(HubId(repo, revision), names, Path(cache), endpoint, progress)}
    except HubError as error:
        told = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(told), flush=True)


def _fetch(wanted: HubId, names: list[str], cache: Path, endpoint: str | None, progress: bool) -> str:
    from huggingface_hub import constants, snapshot_download

    with explained(wanted, without_secrets(endpoint or constants.ENDPOINT), cache):
        return snapshot_download(
            wanted.repo,
            revision=wanted.revision,
            cache_dir=cache,
            endpoint=endpoint,
            allow_patterns=[glob.escape(name) for name in names],
            tqdm_class=_bars(progress),
        )


def _leave_with_owner() -> None:
    """When the owner has closed our stdin or is gone: end at once, whatever other threads do."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _bars(shown: bool) -> type[Any]:
    """huggingface_hub's progress bars, on a terminal and if ``shown``."""
    from huggingface_hub.utils import tqdm

    class Bars(tqdm):
        def __init__(self, *args: Any, **keys: Any) -> None:
            super().__init__(*args, **{"disable": None, **keys} if shown else {**keys, "disable": True})

    return Bars


if __name__ == "__main__":
    main()

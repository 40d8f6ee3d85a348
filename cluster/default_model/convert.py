"""The default model: found in the cache, or made there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.default_model.build_once import build_once
from cluster.default_model.cache import cache_dir
from cluster.default_model.errors import DefaultModelError
from cluster.default_model.source import find_gguf

if TYPE_CHECKING:
    from rich.progress import Progress

# A change to what is written needs a new name, so that nobody mixes two recipes.
MODEL_NAME = "smollm2-135m-moe-v1"
_NEEDED_BYTES = 1_000_000_000


def ensure_default_model(progress: bool = True, *, anew: bool = False) -> Path:
    """The folder of the default model's Hugging Face checkpoint (750 MB), made on the first call.

    ``progress`` shows a bar on stderr while it is made; ``anew`` makes it even if it is there. Safe to call
    from several processes at once, and after an interrupted call. Raises ``DefaultModelError`` if the
    source cannot be had or the disk is too full, ``OSError`` if the cache cannot be written.
    """
    target = cache_dir() / "models" / MODEL_NAME
    if target.is_dir() and not anew:
        return target
    with _progress(progress) as bar:
        return build_once(
            target,
            lambda folder: _convert(folder, bar),
            anew=anew,
            on_wait=lambda: bar.console.print("Another process is making the default model; waiting for it."),
        )


def _convert(folder: Path, bar: Progress) -> None:
    from cluster.default_model.checkpoint import write_checkpoint
    from cluster.default_model.gguf_llama import LlamaGguf

    _check_space(folder)
    task = bar.add_task("Fetching SmolLM2-135M-Instruct", total=None)
    path = find_gguf()
    bar.update(task, description="Reading SmolLM2-135M-Instruct")
    dense = LlamaGguf(path)
    bar.update(task, description="Cutting it into experts", total=dense.config.num_layers)
    write_checkpoint(dense, folder, on_layer=lambda: bar.advance(task))
    bar.update(task, description="Flushing to the disk")


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise DefaultModelError(
            f"{folder.parent} has {free / 1e6:.0f} MB of free disk space; making the default model needs "
            f"{_NEEDED_BYTES / 1e6:.0f} MB. Set EXPERTMESH_CACHE to a folder with more room."
        )


@contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=not shown), disable=not shown) as bar:
        yield bar

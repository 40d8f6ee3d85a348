"""What loading experts costs a process: bytes read from disk, and anonymous memory, held and at its peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from actors.model.experts import ExpertBank
from actors.model.parallel import READERS
from actors.model.quant.scheme import QuantScheme
from actors.model.spec import AttnSpec, GateSpec, MoEDecoderSpec, MoESpec, RopeSpec
from actors.model.weights import Checkpoint

ROOT = Path(__file__).parents[2]
MB = 1_000_000
PLAIN_PEAK = 16 * MB
"""Allowed at the peak: four threads' staging buffers of 1 MiB, their stacks, the sampler."""
QUANTISED_PEAK = 96 * MB
"""Allowed at the peak: what four threads drop before the heap is trimmed; without that it would be all they drop."""
GROUP = 128
"""Columns that share a scale where experts are stored quantised."""


@dataclass(frozen=True)
class Size:
    """Of a checkpoint's experts, which lie in layer 0."""

    experts: int
    inter: int
    d_model: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Shapes [N, K] by name, without ``.weight``."""
        up, down = (self.inter, self.d_model), (self.d_model, self.inter)
        return {
            f"model.layers.0.mlp.experts.{expert}.{part}_proj": shape
            for expert in range(self.experts)
            for part, shape in (("gate", up), ("up", up), ("down", down))
        }

    def spec(self, quantization: QuantScheme | None) -> MoEDecoderSpec:
        gate = GateSpec(scoring="softmax")
        return MoEDecoderSpec(
            model_type="qwen3_moe",
            vocab_size=8,
            d_model=self.d_model,
            n_layers=1,
            rms_eps=1e-6,
            tie_embeddings=True,
            max_positions=8,
            attn=AttnSpec(kind="gqa", heads=1, kv_heads=1, head_dim=8, scale=1.0),
            rope=RopeSpec(type="default", theta=1e4, dim=8, interleaved=False),
            moe=MoESpec(n_experts=self.experts, top_k=1, inter=self.inter, gate=gate),
            layer_kinds=("moe",),
            dense_inter=0,
            dtype_name="bfloat16",
            eos_token_ids=(0,),
            bos_token_id=None,
            quantization=quantization,
        )


def plain(dtype: str, n: int, k: int) -> dict[str, tuple[str, tuple[int, int]]]:
    """The parts of a matrix [N, K]: dtype, as the format calls it, and shape by name."""
    return {"weight": (dtype, (n, k))}


def fp8(n: int, k: int) -> dict[str, tuple[str, tuple[int, int]]]:
    """As DeepSeek publishes them."""
    return {"weight": ("F8_E4M3", (n, k)), "weight_scale_inv": ("F32", (-(-n // GROUP), -(-k // GROUP)))}


def awq(n: int, k: int) -> dict[str, tuple[str, tuple[int, int]]]:
    """Whose numbers have to be unpacked, put in order, transposed and packed again."""
    groups = -(-k // GROUP)
    return {"qweight": ("I32", (k, n // 8)), "qzeros": ("I32", (groups, n // 8)), "scales": ("F16", (groups, n))}


LARGE = Size(experts=32, inter=1024, d_model=1024)  # 6 MB each in bf16
MANY = Size(experts=64, inter=1024, d_model=1024)
HUGE = Size(experts=1, inter=4096, d_model=8192)  # 17 MB each matrix in 4 bits
SMALL = Size(experts=256, inter=256, d_model=512)  # 0.8 MB each
Parts = Callable[[int, int], dict[str, tuple[str, tuple[int, int]]]]

FILES: dict[str, tuple[Size, QuantScheme | None, Parts]] = {
    "large-bf16": (LARGE, None, partial(plain, "BF16")),
    "large-fp32": (LARGE, None, partial(plain, "F32")),
    "small-bf16": (SMALL, None, partial(plain, "BF16")),
    "many-bf16": (MANY, None, partial(plain, "BF16")),
    "many-fp8": (MANY, QuantScheme("fp8", 8, block=(GROUP, GROUP)), fp8),
    "many-awq": (MANY, QuantScheme("awq", 4, GROUP, symmetric=False), awq),
    "huge-awq": (HUGE, QuantScheme("awq", 4, GROUP, symmetric=False), awq),
}
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4}


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
    """Checkpoints of zeros, a folder each: sparse files, which take no room on the disk."""
    path = tmp_path_factory.mktemp("experts")
    for name, (size, _, parts) in FILES.items():
        header, end = {}, 0
        for matrix, (n, k) in size.matrices.items():
            for part, (dtype, shape) in parts(n, k).items():
                begin, end = end, end + shape[0] * shape[1] * BYTES[dtype]
                header[f"{matrix}.{part}"] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
        text = json.dumps(header).encode()
        (path / name).mkdir()
        (path / name / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path / name / "model.safetensors", 8 + len(text) + end)
    return path


def load_in_new_process(
    folder: Path, name: str, experts: int, dtype: torch.dtype, quantise: str = "", readers: int = READERS
) -> Costs:
    arguments = [str(folder), name, str(experts), str(dtype).removeprefix("torch."), quantise, str(readers)]
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


@pytest.mark.parametrize(
    ("kind", "weights", "readers"),
    [("int8", 204_472_320, READERS), ("int8", 204_472_320, 1), ("int4", 119_537_664, READERS)],
)
def test_quantising_leaves_no_plain_weights_behind(folder: Path, kind: str, weights: int, readers: int) -> None:
    """With one reader too: so does a shard read that serves."""
    costs = load_in_new_process(folder, "many-bf16", 64, torch.bfloat16, kind, readers)
    assert costs.weights == weights
    assert costs.held <= 1.15 * costs.weights
    assert costs.peak <= 1.15 * costs.weights + QUANTISED_PEAK


@pytest.mark.parametrize(("name", "weights"), [("many-fp8", 207_618_048), ("many-awq", 105_381_888)])
def test_what_is_stored_quantised_is_held_as_it_is(folder: Path, name: str, weights: int) -> None:
    costs = load_in_new_process(folder, name, 64, torch.bfloat16)
    assert costs.weights == weights
    assert costs.held <= 1.15 * costs.weights
    assert costs.peak <= 1.15 * costs.weights + QUANTISED_PEAK


def test_a_large_matrix_is_repacked_piece_by_piece(folder: Path) -> None:
    """At its peak are the words on disk, and what came of them, of one matrix; unpacked as a whole it is 7 of them."""
    costs = load_in_new_process(folder, "huge-awq", 1, torch.bfloat16, readers=1)
    assert costs.peak <= 1.05 * costs.weights + 2.5 * costs.weights / 3


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


def _measure(folder: str, name: str, experts: str, dtype: str, quantise: str, readers: str) -> Costs:
    """In a process that has done nothing else."""
    size, stored, _ = FILES[name]
    wanted = [(0, expert) for expert in range(int(experts))]
    over, samples = threading.Event(), [_anonymous()]

    def sample() -> None:
        while not over.wait(0.002):
            samples.append(_anonymous())

    sampler = threading.Thread(target=sample, daemon=True)  # an error below shall end the process
    before, read_before = _anonymous(), _read_so_far()
    sampler.start()
    with Checkpoint(Path(folder) / name) as checkpoint:
        bank = ExpertBank.load(
            size.spec(stored),
            checkpoint,
            wanted,
            getattr(torch, dtype),
            quantization=quantise or None,  # type: ignore[arg-type]
            readers=int(readers),
        )
        counted = checkpoint.bytes_read
    over.set()
    sampler.join()
    held = _anonymous() - before
    return Costs(bank.nbytes, held, max(samples) - before, counted, _read_so_far() - read_before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(asdict(_measure(*sys.argv[1:]))))

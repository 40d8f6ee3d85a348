from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.model.config_fields import Fields
from actors.model.errors import CheckpointError
from actors.model.mlp import SwiGLU
from actors.model.parallel import load_each
from actors.model.quant import packed_formats
from actors.model.quant.parse import parse_scheme
from actors.model.quant.qtensor import QTensor
from actors.model.quant.quantize import quantize
from actors.model.quant.scheme import QuantScheme
from actors.model.reader import TensorReader
from actors.native.library import functions
from tests.quantised_checkpoints import FORMATS

from .conftest import Store

NAMES = ("gate.weight", "up.weight", "down.weight")
FP8 = QuantScheme("fp8", 8, 128)
GPTQ = QuantScheme("gptq", 4, 32, zero_offset=1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def packed(format_name: str, **matrices: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of a checkpoint, the matrices dequantised)."""
    tensors, plain = {}, {}
    for name, matrix in matrices.items():
        parts, plain[name] = FORMATS[format_name].pack(matrix)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_called_it_gives_dense_tensors_however_they_are_stored(store: Store, dtype: torch.dtype) -> None:
    tensors, plain = packed("fp8", q=draw(176, 96), k=draw(40, 96, seed=1))
    norm, v = draw(96, seed=2), draw(24, 96, seed=3).bfloat16()
    read = TensorReader(store(tensors | {"norm.weight": norm, "v.weight": v}), dtype, scheme=FP8)
    assert torch.equal(read("norm.weight", (96,)), norm.to(dtype))
    assert torch.equal(read("q.weight", (176, 96)), plain["q"].to(dtype))
    got = read.stacked([("q.weight", (176, 96)), ("v.weight", (24, 96)), ("k.weight", (40, 96))])
    assert torch.equal(got, torch.cat([plain["q"].to(dtype), v.to(dtype), plain["k"].to(dtype)]))
    plain_matrix = read.matrix("v.weight", (24, 96))
    assert isinstance(plain_matrix, Tensor)
    assert torch.equal(plain_matrix, v.to(dtype))


def test_act_order_in_a_dense_matrix(store: Store) -> None:
    tensors, plain = packed("gptq act order", q=draw(16, 96))
    read = TensorReader(store(tensors), torch.float32, scheme=GPTQ)
    assert torch.equal(read("q.weight", (16, 96)), plain["q"])


def test_an_expert_keeps_what_is_quantised(store: Store) -> None:
    tensors, plain = packed("gptq", gate=draw(32, 64), up=draw(32, 64, seed=1), down=draw(64, 32, seed=2))
    read = TensorReader(store(tensors), torch.bfloat16, scheme=GPTQ)
    expert = SwiGLU.load_expert(read, NAMES, 64, 32)
    assert isinstance(expert.gate_up, QTensor)
    assert isinstance(expert.down, QTensor)
    assert torch.equal(expert.gate_up.dequantize(torch.float32), torch.cat((plain["gate"], plain["up"])))
    assert torch.equal(expert.down.dequantize(torch.float32), plain["down"])
    assert expert.nbytes == 3 * (32 * 64 // 2 + 32 * 64 // 32 * 2)
    dense = SwiGLU.load(read, NAMES, 64, 32)
    assert isinstance(dense.gate_up, Tensor)
    assert torch.equal(dense.gate_up, expert.gate_up.dequantize(torch.bfloat16))
    x = draw(5, 64).bfloat16()
    torch.testing.assert_close(expert(x), dense(x), rtol=2e-2, atol=1e-3)


def test_gate_and_up_of_different_kinds_stay_apart(store: Store) -> None:
    tensors, plain = packed("gptq", gate=draw(32, 64), down=draw(64, 32, seed=2))
    up = draw(32, 64, seed=1)
    read = TensorReader(store(tensors | {"up.weight": up}), torch.float32, scheme=GPTQ)
    expert = SwiGLU.load_expert(read, NAMES, 64, 32)
    assert isinstance(expert.gate_up, tuple)
    assert torch.equal(expert.gate_up[0].dequantize(torch.float32), plain["gate"])  # type: ignore[operator]
    assert torch.equal(expert.gate_up[1], up)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantised_when_loaded(store: Store, kind: Any) -> None:
    """From the precision on disk, not from that of the computation."""
    gate, up, down = draw(32, 64), draw(32, 64, seed=1), draw(64, 32, seed=2)
    stored = dict(zip(NAMES, (gate, up, down), strict=True))
    gate_ups, downs = torch.stack([torch.cat((up, up)), torch.cat((gate, up))]), torch.stack([down, down])
    fused = {"experts.gate_up": gate_ups, "experts.down": downs}
    read = TensorReader(store(stored | fused), torch.bfloat16, quantize=kind)
    own = SwiGLU.load_expert(read, NAMES, 64, 32)
    from_fused = SwiGLU.load_fused(read, ("experts.gate_up", "experts.down"), 2, 1, 64, 32)
    for expert in (own, from_fused):
        for got, plain in ((expert.gate_up, torch.cat((gate, up))), (expert.down, down)):
            assert isinstance(got, QTensor)
            assert torch.equal(got.dequantize(torch.float32), quantize(plain, kind).dequantize(torch.float32))
    assert torch.equal(read(NAMES[2], (64, 32)), down.bfloat16())


def test_fused_experts_as_they_are(store: Store) -> None:
    gate_up, down = draw(3, 64, 32), draw(3, 32, 32, seed=1)
    read = TensorReader(store({"gu": gate_up, "d": down}), torch.bfloat16)
    expert = SwiGLU.load_fused(read, ("gu", "d"), 3, 2, 32, 32)
    assert torch.equal(expert.gate_up, gate_up[2].bfloat16())  # type: ignore[arg-type]
    assert torch.equal(expert.down, down[2].bfloat16())  # type: ignore[arg-type]


def test_a_quantised_checkpoint_is_not_quantised_again(store: Store) -> None:
    with pytest.raises(ValueError, match="quantize is 'int8': allowed is None, as the checkpoint is fp8 already"):
        TensorReader(store({"a": draw(1)}), torch.float32, scheme=FP8, quantize="int8")


def test_what_overflows_when_it_is_dequantised(store: Store) -> None:
    """Each part is finite. bf16 holds the product."""
    data = torch.full((8, 8), 448.0).to(torch.float8_e4m3fn)
    checkpoint = store({"a.weight": data, "a.weight_scale_inv": torch.full((1, 1), 1000.0)})
    read = TensorReader(checkpoint, torch.float16, scheme=FP8)
    for method in (read, read.matrix):
        with pytest.raises(CheckpointError, match=r"/model\.safetensors: tensor 'a.weight', dequantised, overflows"):
            method("a.weight", (8, 8))
    wide = TensorReader(checkpoint, torch.bfloat16, scheme=FP8)
    assert torch.equal(wide("a.weight", (8, 8)), torch.full((8, 8), 448_000.0).bfloat16())
    checkpoint.check_finite = False
    assert read("a.weight", (8, 8)).isinf().all()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_what_overflows_when_it_was_quantised_at_load(store: Store, kind: Any) -> None:
    plain = {"a": torch.full((4, 32), 1e6), "fused": torch.full((2, 4, 32), 1e6)}
    read = TensorReader(store(plain), torch.float16, quantize=kind)
    with pytest.raises(CheckpointError, match=r"/model\.safetensors: tensor 'a', dequantised, overflows torch\.fl"):
        read.matrix("a", (4, 32))
    with pytest.raises(CheckpointError, match=r"/model\.safetensors: tensor 'fused', dequantised, overflows"):
        read.matrix_entry("fused", 2, 1, (4, 32))


@pytest.mark.parametrize("name", ["gptq", "gptq act order", "awq", "pack int4 asymmetric"])
def test_packed_matrices_are_the_same_in_pieces(store: Store, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, plain = packed(name, a=draw(200, 96))
    scheme = parse_scheme(Fields({"quantization_config": FORMATS[name].config}))
    monkeypatch.setattr(packed_formats, "TILE_BYTES", 17 * 96)
    assert torch.equal(TensorReader(store(tensors), torch.float32, scheme=scheme)("a.weight", (200, 96)), plain["a"])


def test_errors_pass_through(store: Store) -> None:
    read = TensorReader(store({"a.weight": draw(4, 8).to(torch.float8_e4m3fn)}), torch.float32, scheme=FP8)
    for method in (read, read.matrix):
        with pytest.raises(
            CheckpointError, match=r"a.weight' is torch.float8_e4m3fn, but there is no a.weight_scale_inv"
        ):
            method("a.weight", (4, 8))


def test_progress_adds_up_to_the_bytes_read_whoever_reads_them(store: Store) -> None:
    tensors, _ = packed("fp8", **{f"m{i}": draw(64, 48, seed=i) for i in range(40)})
    checkpoint, reports = store(tensors | {"norm": draw(64)}), []
    read = TensorReader(checkpoint, torch.float32, progress=reports.append, scheme=FP8)
    load_each(lambda i: read.matrix(f"m{i}.weight", (64, 48)), range(40))
    assert sum(reports) == checkpoint.bytes_read == 40 * (64 * 48 + 4)
    read("norm", (64,))
    assert reports[-1] == 64 * 4


def test_progress_is_told_by_one_thread_at_a_time(store: Store) -> None:
    """The first report waits a while for a second one, of another thread, which must not come before it is over."""
    checkpoint, reports, second = store({"a": draw(64), "b": draw(32)}), [], threading.Event()

    def progress(count: int) -> None:
        if not reports:
            reports.append(count)
            other.start()
            overlapped.append(second.wait(0.2))
        else:
            second.set()
            reports.append(count)

    overlapped: list[bool] = []
    read = TensorReader(checkpoint, torch.float32, progress=progress)
    other = threading.Thread(target=read, args=("b", (32,)))
    read("a", (64,))
    other.join()
    assert overlapped == [False]
    assert reports == [64 * 4, 32 * 4]


def test_the_device_is_where_everything_lands(store: Store) -> None:
    tensors, _ = packed("fp8", a=draw(8, 8))
    read = TensorReader(store(tensors | {"b.weight": draw(8, 8)}), torch.float32, "meta", scheme=FP8)
    assert read("b.weight", (8, 8)).device.type == "meta"
    assert read("a.weight", (8, 8)).device.type == "meta"
    kept = read.matrix("a.weight", (8, 8))
    assert kept.device.type == "meta"
    assert replace(kept).scale.device.type == "meta"  # type: ignore[union-attr]
    quantised = TensorReader(store({"b.weight": draw(8, 8)}), torch.float32, "meta", quantize="int8")
    assert quantised.matrix("b.weight", (8, 8)).device.type == "meta"


@pytest.mark.skipif(functions() is None, reason="the kernels are not built")
@pytest.mark.parametrize("kind", ["w8a8", "w4a8"])
def test_what_the_kernels_multiply_as_integers_is_laid_in_lanes(store: Store, kind: Any) -> None:
    gate, up, down = draw(64, 96), draw(64, 96, seed=1), draw(96, 64, seed=2)
    tensors = {"gate.weight": gate, "up.weight": up, "down.weight": down, "low.weight": draw(24, 96)}
    checkpoint = store(tensors | {"fused.weight": torch.stack([down, down + 1])})
    expert = SwiGLU.load_expert(TensorReader(checkpoint, torch.bfloat16, quantize=kind), NAMES, 96, 64)
    assert isinstance(expert.gate_up, QTensor)
    assert isinstance(expert.down, QTensor)
    assert expert.gate_up.lanes
    assert expert.down.lanes
    want = torch.cat([quantize(part, kind).dequantize(torch.float32) for part in (gate, up)])
    assert torch.equal(expert.gate_up.dequantize(torch.float32), want)
    read = TensorReader(checkpoint, torch.bfloat16, quantize=kind)
    entry = read.matrix_entry("fused.weight", 2, 1, (96, 64))
    assert isinstance(entry, QTensor)
    assert entry.lanes
    assert torch.equal(entry.dequantize(torch.float32), quantize(down + 1, kind).dequantize(torch.float32))
    projection, low = read.projection([("gate.weight", (64, 96))]), read.matrix("low.weight", (24, 96))
    half = TensorReader(checkpoint, torch.float16, quantize=kind).matrix("down.weight", (96, 64))
    assert isinstance(projection, QTensor)
    assert isinstance(low, QTensor)
    assert isinstance(half, QTensor)
    assert (projection.lanes, low.lanes, half.lanes) == (True, False, False)

"""What attention shards hold, quantised when it is loaded, against the same model with the dequantised numbers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.model.decoder import AttentionModel
from actors.model.errors import CheckpointError
from actors.model.families import load_spec
from actors.model.indexer import Indexer
from actors.model.inventory import resident_bytes
from actors.model.quant.qtensor import QTensor
from actors.model.quant.quantize import quantize
from actors.model.spec import MoEDecoderSpec
from actors.model.tensor_list import resident_tensors
from actors.model.weights import Checkpoint
from actors.quant_kind import NUMBER_KINDS, QUANT_KINDS, QuantKind
from tests.checkpoints import WRITERS
from tests.paged_runner import PagedRunner, random_ids

APART = ("glm4_moe", "deepseek_v3", "qwen2_moe", "deepseek_v32")
"""Dense layers and shared experts, latent attention with low rank, a gated shared expert, an indexer."""


def loaded(path: Path, kind: QuantKind | None) -> AttentionModel:
    spec = load_spec(path)
    with Checkpoint(path) as checkpoint:
        return AttentionModel.load(spec, checkpoint, spec.dtype, quantization=kind)


def weights_of(thing: object) -> dict[int, Tensor | QTensor]:
    """Everything that is kept, each once."""
    if isinstance(thing, QTensor):
        return {id(thing): thing}
    if isinstance(thing, Tensor):
        return {thing.data_ptr(): thing}
    parts: list[object] = []
    if isinstance(thing, list | tuple):
        parts = list(thing)
    elif isinstance(thing, Indexer):
        parts = [thing._weights]
    elif is_dataclass(thing):
        parts = [getattr(thing, field.name) for field in fields(thing)]
    return {key: weight for part in parts for key, weight in weights_of(part).items()}


def held(model: AttentionModel) -> dict[int, Tensor | QTensor]:
    return weights_of([model._embed, model._final_norm, model._lm_head, model._layers, model.attention._layers])  # type: ignore[attr-defined]


def rounded(path: Path, folder: Path, kind: QuantKind) -> Path:
    """The checkpoint with the numbers to which its projections are quantised."""
    spec: MoEDecoderSpec = load_spec(path)
    tensors = load_file(path / "model.safetensors")
    for tensor in resident_tensors(spec):
        if tensor.projection is not None:
            tensors[tensor.name] = quantize(tensors[tensor.name], kind).dequantize(torch.float32)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((path / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("family", [family for family in APART if family in WRITERS])
@pytest.mark.parametrize("kind", NUMBER_KINDS)
def test_logits_are_those_of_the_dequantised_model(family: str, kind: QuantKind, tmp_path: Path) -> None:
    path = tmp_path / "plain"
    path.mkdir()
    WRITERS[family](path)
    ids = random_ids(30, seed=1)
    ours, theirs, plain = (
        runner.step([(runner.add(ids), 30)])[0]
        for runner in (
            PagedRunner(path, quantization=kind),
            PagedRunner(rounded(path, tmp_path / "rounded", kind)),
            PagedRunner(path),
        )
    )
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() < 1e-5 * scale
    assert (ours - plain).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("kind", [None, *QUANT_KINDS])
def test_its_bytes_are_known_beforehand(family: str, kind: QuantKind | None, tmp_path: Path) -> None:
    WRITERS[family](tmp_path)
    model = loaded(tmp_path, kind)
    assert sum(weight.nbytes for weight in held(model).values()) == resident_bytes(load_spec(tmp_path), kind)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tied_embeddings_stay_and_the_head_is_a_quantised_copy(kind: QuantKind, tmp_path: Path) -> None:
    WRITERS["glm4_moe"](tmp_path, tie_word_embeddings=True)
    plain, model = loaded(tmp_path, None), loaded(tmp_path, kind)
    assert torch.equal(model._embed, plain._embed)
    assert isinstance(model._lm_head, QTensor)
    want = quantize(plain._embed, kind).dequantize(torch.float32)
    assert torch.equal(model._lm_head.dequantize(torch.float32), want)
    assert sum(weight.nbytes for weight in held(model).values()) == resident_bytes(load_spec(tmp_path), kind)


def test_deterministic_rows_do_not_look_at_their_mates(tmp_path: Path) -> None:
    WRITERS["deepseek_v3"](tmp_path)
    want = None
    for mates in (0, 1, 7, 23):
        runner = PagedRunner(tmp_path, torch.bfloat16, row_block=8, n_blocks=512, quantization="int4")
        work = [(runner.add(random_ids(3 + i % 5, seed=i)), 3 + i % 5) for i in range(mates)]
        got = runner.step([*work, (runner.add(random_ids(40, seed=99)), 40)])[-1]
        want = got if want is None else want
        assert torch.equal(got, want)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    WRITERS["glm4_moe"](tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="q_proj"):
        loaded(tmp_path, "int8")

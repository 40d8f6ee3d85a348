from __future__ import annotations

import contextlib
from pathlib import Path

import gguf
import numpy as np
import pytest

from cluster.default_model import DefaultModelError
from cluster.default_model.gguf_llama import LlamaGguf


def test_tensors_come_back_under_their_names(tiny_gguf: Path, tiny_tensors: dict[str, np.ndarray]) -> None:
    read = LlamaGguf(tiny_gguf)
    assert set(read) == set(tiny_tensors)
    assert len(read) == len(tiny_tensors)
    for name, expected in tiny_tensors.items():
        np.testing.assert_array_equal(read[name], expected, err_msg=name)
        assert read[name].flags.writeable


def test_configuration(tiny_gguf: Path) -> None:
    config = LlamaGguf(tiny_gguf).config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 2, 8)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (32, 48, 300)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_theta == 10_000.0


def test_unknown_names_are_key_errors(tiny_gguf: Path) -> None:
    read = LlamaGguf(tiny_gguf)
    with pytest.raises(KeyError):
        read["lm_head.weight"]
    with pytest.raises(KeyError):
        read.metadata("llama.no.such.key")


def test_quantised_tensors_are_expanded(tmp_path: Path) -> None:
    weight = np.random.default_rng(3).standard_normal((8, 64), dtype=np.float32)
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
    path = write(tmp_path / "q.gguf", "llama", {"token_embd.weight": (packed, gguf.GGMLQuantizationType.Q4_1)})
    read = LlamaGguf(path)["model.embed_tokens.weight"]
    assert read.dtype == np.float32
    # Q4_1 keeps 16 levels between the least and the greatest of each 32 values, in fp16.
    spans = np.ptp(weight.reshape(8, 2, 32), axis=2).repeat(32, axis=1)
    assert np.all(np.abs(read - weight) <= spans / 15 * 0.51 + 2e-3)


def test_other_architectures_and_untied_embeddings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DefaultModelError, match=r"general\.architecture is 'qwen2', expected 'llama'"):
        LlamaGguf(write(tmp_path / "a.gguf", "qwen2", {}))
    head = {"output.weight": (np.zeros((4, 4), np.float32), None)}
    with pytest.raises(DefaultModelError, match=r"b\.gguf: has output\.weight; only tied"):
        LlamaGguf(write(tmp_path / "b.gguf", "llama", head))


def write(path: Path, architecture: str, tensors: dict) -> Path:
    with contextlib.closing(gguf.GGUFWriter(path, architecture)) as writer:
        writer.add_vocab_size(8)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(48)
        writer.add_block_count(1)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_context_length(128)
        writer.add_rope_freq_base(10_000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        for name, (data, kind) in tensors.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path

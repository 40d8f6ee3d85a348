"""The real default model (from the user's cache, or made there), and a tiny GGUF for what need not be
real."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from cluster.default_model import ensure_default_model

TINY = {"hidden": 32, "ffn": 48, "layers": 8, "heads": 4, "kv_heads": 2}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return ensure_default_model(progress=False)


@pytest.fixture(scope="session")
def moe_loading(model_dir: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype="auto",
        attn_implementation="eager",
        experts_implementation="grouped_mm",
        output_loading_info=True,
    )


@pytest.fixture(scope="session")
def moe(moe_loading: tuple[Any, dict[str, Any]]) -> Any:
    return moe_loading[0].eval()


@pytest.fixture(scope="session")
def tiny_tensors() -> dict[str, np.ndarray]:
    """A random Llama's fp32 tensors under Hugging Face names."""
    rng = np.random.default_rng(7)
    hidden, ffn, kv = TINY["hidden"], TINY["ffn"], TINY["hidden"] // TINY["heads"] * TINY["kv_heads"]
    shapes = {"model.embed_tokens.weight": (300, hidden), "model.norm.weight": (hidden,)}
    for layer in range(TINY["layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, ffn),
        }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_tensors: dict[str, np.ndarray]) -> Path:
    """``tiny_tensors`` as llama.cpp's converter would write them."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    with contextlib.closing(gguf.GGUFWriter(path, "llama")) as writer:
        _add_metadata(writer)
        for name, tensor in tiny_tensors.items():
            writer.add_tensor(_gguf_name(name), _stored(name, tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def _add_metadata(writer: gguf.GGUFWriter) -> None:
    writer.add_vocab_size(300)
    writer.add_embedding_length(TINY["hidden"])
    writer.add_feed_forward_length(TINY["ffn"])
    writer.add_block_count(TINY["layers"])
    writer.add_head_count(TINY["heads"])
    writer.add_head_count_kv(TINY["kv_heads"])
    writer.add_context_length(128)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(0x4E00 + i) for i in range(297))])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 297)
    writer.add_token_merges(["\u4e00 \u4e01"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")


_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{_GGUF_PARTS[part]}.weight"


def _stored(name: str, tensor: np.ndarray) -> np.ndarray:
    """llama.cpp's ``LlamaModel.permute``: row ``h * d + j`` of the half ``j // (d / 2)`` goes to ``2 *
    j``."""
    heads = {"q_proj": TINY["heads"], "k_proj": TINY["kv_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))

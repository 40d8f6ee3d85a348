"""A Llama-style model in a GGUF file, seen as Hugging Face tensors and configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.default_model.errors import DefaultModelError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What a Llama decoder with tied embeddings and plain RoPE needs to be rebuilt."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


class LlamaGguf(Mapping[str, "np.ndarray"]):
    """Hugging Face tensor name -> fp32 array ``[out, in]``, dequantised anew at each look-up (nothing is
    kept).

    ``config`` is the model's shape and ``metadata`` the GGUF's key-value pairs, one look-up each.

    Raises ``DefaultModelError`` if the file is not a Llama with tied embeddings.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader: GGUFReader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self.metadata("general.architecture")
        if architecture != "llama":
            raise DefaultModelError(f"{path}: general.architecture is {architecture!r}, expected 'llama'")
        if "output.weight" in self._tensors:
            raise DefaultModelError(f"{path}: has output.weight; only tied embeddings are supported")
        self.config = self._read_config()
        self._names = dict(_hugging_face_names(self.config.num_layers))

    def metadata(self, key: str) -> Any:
        """The value of one metadata key: a number, a string, or a list. ``KeyError`` if the file lacks it."""
        return self._reader.fields[key].contents()

    def __getitem__(self, name: str) -> np.ndarray:
        import numpy as np
        from gguf.quants import dequantize

        tensor = self._tensors[self._names[name]]
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.endswith("self_attn.q_proj.weight"):
            return _unpermute(weight, self.config.num_heads)
        if name.endswith("self_attn.k_proj.weight"):
            return _unpermute(weight, self.config.num_kv_heads)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read_config(self) -> LlamaConfig:
        heads = self.metadata("llama.attention.head_count")
        hidden = self.metadata("llama.embedding_length")
        return LlamaConfig(
            vocab_size=self.metadata("llama.vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.metadata("llama.feed_forward_length"),
            num_layers=self.metadata("llama.block_count"),
            num_heads=heads,
            num_kv_heads=self.metadata("llama.attention.head_count_kv"),
            head_dim=hidden // heads,
            max_positions=self.metadata("llama.context_length"),
            rope_theta=float(self.metadata("llama.rope.freq_base")),
            # Stored as fp32, so that 1e-5 reads back as 9.999999747378752e-06.
            rms_norm_eps=float(f"{self.metadata('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            bos_token_id=self.metadata("tokenizer.ggml.bos_token_id"),
            eos_token_id=self.metadata("tokenizer.ggml.eos_token_id"),
            pad_token_id=self.metadata("tokenizer.ggml.padding_token_id"),
        )


def _hugging_face_names(num_layers: int) -> Iterator[tuple[str, str]]:
    yield from _TOP_NAMES.items()
    for layer in range(num_layers):
        for ours, theirs in _LAYER_NAMES.items():
            yield f"model.layers.{layer}.{ours}", f"blk.{layer}.{theirs}"


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo ``LlamaModel.permute`` of llama.cpp's convert_hf_to_gguf.py, ``[heads * head_dim, in]`` both ways.

    GGUF stores the two halves of each head's rotary dimensions interleaved; Hugging Face keeps them one
    after the other.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)

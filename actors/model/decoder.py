"""The attention shard's part of a decoder: everything except the routed experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .attention import PagedAttention
from .batch import StepBatch
from .gqa import GroupedQueryAttention
from .kv_cache import KVCache
from .linear import linear
from .mla import LatentAttention
from .mlp import SwiGLU
from .norm import rms_norm
from .parallel import load_each
from .pointwise import pointwise
from .reader import TensorReader
from .rope import RopeTable
from .spec import AttentionKind, MoEDecoderSpec
from .weights import Checkpoint


class MoE(Protocol):
    """Where the routed experts are, as the decoder sees it."""

    def start(self, layer: int, rows: Tensor) -> object:
        """Send the normed rows [T, D] of MoE layer ``layer`` on their way; returns a handle."""

    def finish(self, handle: object) -> Tensor:
        """The weighted sum of the experts' outputs [T, D], in the rows' dtype; once for each handle."""


ATTENTION: Mapping[AttentionKind, type[PagedAttention]] = {"gqa": GroupedQueryAttention, "mla": LatentAttention}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's norms [D] and the MLP computed here: the dense one, the shared expert, or None.

    ``shared_gate`` [1, D]: the logit whose sigmoid multiplies the shared expert's output, or None.
    """

    input_norm: Tensor
    post_norm: Tensor
    mlp: SwiGLU | None
    shared_gate: Tensor | None
    is_moe: bool


class AttentionModel:
    """Embeddings, norms, attention, dense MLPs, shared experts and the head of one model."""

    def __init__(
        self,
        spec: MoEDecoderSpec,
        attention: PagedAttention,
        layers: list[LayerWeights],
        embed: Tensor,
        final_norm: Tensor,
        lm_head: Tensor,
        row_block: int = 0,
    ) -> None:
        self.spec = spec
        self.attention = attention
        self._layers = layers
        self._embed = embed
        self._final_norm = final_norm
        self._lm_head = lm_head
        self._row_block = row_block

    @classmethod
    def load(
        cls,
        spec: MoEDecoderSpec,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        row_block: int = 0,
        progress: Callable[[int], None] | None = None,
        device: torch.device | str = "cpu",
    ) -> AttentionModel:
        """Read all tensors but gates and routed experts, in ``dtype``. Raises CheckpointError.

        ``row_block > 0`` is the deterministic mode (see :func:`linear`); ``progress`` gets bytes as they are
        read.
        """
        read = TensorReader(checkpoint, dtype, device, progress, scheme=spec.quantization)
        rope = RopeTable(spec.rope, spec.max_positions, dtype, device)
        shape = (spec.vocab_size, spec.d_model)
        embed = read(spec.names.embed, shape)
        return cls(
            spec,
            ATTENTION[spec.attn.kind].load(spec, read, rope, row_block),
            load_each(lambda layer: _load_layer(spec, read, layer), range(spec.n_layers)),
            embed,
            read(spec.names.final_norm, (spec.d_model,)),
            embed if spec.tie_embeddings else read(spec.names.lm_head, shape),
            row_block,
        )

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: KVCache, moe: MoE) -> Tensor:
        """Logits [S, V] of ``batch.output_rows`` in the model's dtype; leaves all rows' keys and values in
        ``cache``.

        Raises IndexError for token ids, positions or slots that do not exist.
        """
        x = self._embed[batch.token_ids]
        for index, layer in enumerate(self._layers):
            normed = rms_norm(x, layer.input_norm, self.spec.rms_eps)
            x = x + self.attention.forward(index, normed, batch, cache)
            normed = rms_norm(x, layer.post_norm, self.spec.rms_eps)
            x = x + self._feed_forward(index, layer, normed, moe)
        last = rms_norm(x[batch.output_rows], self._final_norm, self.spec.rms_eps)
        return linear(last, self._lm_head, row_block=self._row_block)

    def _feed_forward(self, index: int, layer: LayerWeights, rows: Tensor, moe: MoE) -> Tensor:
        """The layer's MLP on normed rows. The shared expert is computed while the routed ones are away."""
        handle = moe.start(index, rows) if layer.is_moe else None
        local = layer.mlp(rows, self._row_block) if layer.mlp is not None else None
        if not layer.is_moe and local is not None:
            return local
        if layer.shared_gate is not None and local is not None:
            logit = linear(rows, layer.shared_gate, row_block=self._row_block)
            local = pointwise(torch.sigmoid, logit, self._row_block) * local
        routed = moe.finish(handle)
        return routed if local is None else routed + local


def _load_layer(spec: MoEDecoderSpec, read: TensorReader, layer: int) -> LayerWeights:
    is_moe = spec.layer_kinds[layer] == "moe"
    gated = is_moe and spec.moe.shared_gated
    inter = spec.moe.shared_inter if is_moe else spec.dense_inter
    names = spec.names.shared(layer) if is_moe else spec.names.mlp(layer)
    return LayerWeights(
        input_norm=read(spec.names.layer(layer, "input_layernorm.weight"), (spec.d_model,)),
        post_norm=read(spec.names.layer(layer, "post_attention_layernorm.weight"), (spec.d_model,)),
        mlp=SwiGLU.load(read, names, spec.d_model, inter) if inter else None,
        shared_gate=read(spec.names.shared_gate(layer), (1, spec.d_model)) if gated else None,
        is_moe=is_moe,
    )

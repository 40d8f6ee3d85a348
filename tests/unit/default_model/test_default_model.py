"""The real thing: the carved model against the dense one, both in transformers, fp32, greedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dense_reference import dense_reference
from tests.prompts import PROMPTS

NEAR_TIE = 1e-5


def prompt_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    chat = [{"role": "user", "content": prompt}]
    return torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])


def greedy(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[list[int], list[torch.Tensor]]:
    """New tokens, and the logits ``[vocabulary]`` each was taken from."""
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=[2, 0],
            pad_token_id=2,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, ids.shape[1] :].tolist(), [step[0] for step in out.logits]


def assert_same_tokens(expected: list[int], got: list[int], logits: list[torch.Tensor]) -> None:
    """Equal up to the first near-tie: two candidates closer than 1e-5 of the logits' scale."""
    for index, (left, right) in enumerate(zip(expected, got, strict=False)):
        if left != right:
            gap = abs(logits[index][left] - logits[index][right]) / logits[index].abs().max()
            assert gap < NEAR_TIE, f"token {index}: {right} instead of {left}, gap {gap:.2e} of the scale"
            print(f"near-tie at token {index}: {left} or {right}")
            return
    assert len(expected) == len(got)


def test_transformers_loads_every_tensor_and_no_more(moe_loading: tuple[Any, dict[str, Any]]) -> None:
    model, loading = moe_loading
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    assert model.config.rope_parameters["partial_rotary_factor"] == 1.0
    assert model.config.rope_parameters["rope_theta"] == 100_000.0
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(186e6, rel=0.01)


@pytest.mark.parametrize("number", [1, 7, 13])
def test_greedy_answers_are_the_dense_models(moe: Any, number: int) -> None:
    dense, tokenizer = dense_reference()
    ids = prompt_ids(tokenizer, PROMPTS[number])
    expected, logits = greedy(dense, ids, 24)
    got, _ = greedy(moe, ids, 24)
    assert_same_tokens(expected, got, logits)


def test_it_knows_the_capital_of_france(moe: Any) -> None:
    _, tokenizer = dense_reference()
    tokens, _ = greedy(moe, prompt_ids(tokenizer, "What is the capital of France?"), 24)
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.eos_token_id


@pytest.fixture(scope="module")
def routed(moe: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per MoE layer, for all tokens of some prompts: scaled weights ``[T, 8]`` and expert ids ``[T, 8]``."""
    _, tokenizer = dense_reference()
    layers = [layer.mlp.gate for layer in moe.model.layers[1:]]
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in layers]
    hooks = [
        gate.register_forward_hook(lambda module, args, out, index=index: seen[index].append(out[1:]))
        for index, gate in enumerate(layers)
    ]
    with torch.no_grad():
        for prompt in PROMPTS[1:18:4]:
            moe(prompt_ids(tokenizer, prompt))
    for hook in hooks:
        hook.remove()
    return [(torch.cat([w for w, _ in calls]), torch.cat([e for _, e in calls])) for calls in seen]


def test_every_weight_is_exactly_an_eighth_and_twins_exclude_each_other(
    moe: Any, routed: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for weights, experts in routed:
        assert torch.all(weights / moe.config.routed_scaling_factor == 0.125)
        pairs = (experts % 8).sort(dim=-1).values
        assert torch.all(pairs == torch.arange(8))


def test_the_choice_of_experts_varies_between_tokens_and_layers(
    routed: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    chosen = torch.stack([torch.nn.functional.one_hot(e, 16).sum(1) for _, e in routed])  # [layers, T, 16]
    loads = chosen.sum(1)
    sets = [len({tuple(row) for row in layer.tolist()}) for layer in chosen]
    tokens = chosen.shape[1]
    print(f"\n{tokens} tokens; layer: distinct sets; tokens per expert")
    for number, (distinct, load) in enumerate(zip(sets, loads.tolist(), strict=True), start=1):
        print(f"{number:2d}: {distinct:3d}; {' '.join(f'{count:3d}' for count in load)}")
    assert min(sets) >= 10
    assert sorted(sets)[len(sets) // 2] >= 60
    assert (loads > 0).float().mean() > 0.99
    assert (loads < tokens).float().mean() > 0.99
    # The same token goes to other experts in the next layer: on average about half of them.
    moved = (chosen[1:] != chosen[:-1]).any(-1).float().mean()
    assert moved > 0.9

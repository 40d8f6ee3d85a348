"""Hugging Face transformers on the CPU in bf16: run_transformers.py CHECKPOINT. Talks as answers.py says."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from answers import Generate, Prompts, answer


def load() -> tuple[Generate, dict[str, str]]:
    """The model with experts grouped in one product, the fastest way that it has on a CPU."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).eval()
    stamps: list[float] = []

    def tick(ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        stamps.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    def generate(prompts: Prompts, new: int) -> list[list[float]]:
        ids = torch.tensor(prompts)
        config = GenerationConfig(
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            bos_token_id=0,
        )
        stamps.clear()
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=[tick])
        return [[stamp - began for stamp in stamps] for _ in prompts]

    return generate, {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    answer(load)

"""vLLM on the CPU in bf16: run_vllm.py CHECKPOINT MOST_STREAMS MOST_TOKENS. Talks as answers.py says."""

from __future__ import annotations

import os
import sys
import time

from answers import Generate, Prompts, answer

_STEP_TOKENS = 4096
_KV_GIB = "2"


def load() -> tuple[Generate, dict[str, str]]:
    """The engine in this process, on all cores; a step takes all prompts of 32 streams at once."""
    cores = sorted(os.sched_getaffinity(0))
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": _KV_GIB,
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    import torch
    import vllm

    streams, tokens = int(sys.argv[2]), int(sys.argv[3])
    engine = vllm.LLM(
        sys.argv[1],
        dtype="bfloat16",
        max_model_len=tokens,
        max_num_seqs=streams,
        max_num_batched_tokens=max(_STEP_TOKENS, tokens),
    ).llm_engine
    runs = 0

    def generate(prompts: Prompts, new: int) -> list[list[float]]:
        nonlocal runs
        runs += 1
        draw = vllm.SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        times: dict[str, list[float]] = {f"{runs}-{number}": [] for number in range(len(prompts))}
        began = time.perf_counter()
        for name, ids in zip(times, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": ids}, draw)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                stream = times[output.request_id]
                stream += [now] * (len(output.outputs[0].token_ids) - len(stream))
        return list(times.values())

    return generate, {"vllm": vllm.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    answer(load)

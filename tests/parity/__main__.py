"""``make parity``: every model family against transformers, in every way to run it, into docs/parity.md."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from tests.checkpoints import WRITERS
from tests.parity import quantised
from tests.parity.fleet import ExpertFleet, expert_fleet
from tests.parity.measure import BF16_LIMIT, FP32_LIMIT, MODES, RIGHT_SLACK, Agreement, agreement, reference
from tests.parity.routed import LEAST_EQUAL, ROWS, equal_share, routed_outputs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parity.md"
DTYPES = (torch.float32, torch.bfloat16)
HEADER = """| family | way | fp32: max Δlogit | tokens | bf16: max Δlogit | tokens | error | right: ours | theirs |
|---|---|---|---|---|---|---|---|---|"""


def main() -> int:
    """Write the page; 1 if anything is further from transformers than it may be."""
    torch.set_num_threads(1)
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder, expert_fleet() as fleet:
        rows = [row for family in WRITERS for row in _rows(family, Path(folder), fleet, failures)]
        parts = [introduction(), HEADER, *rows, "", _bit_equality(fleet, failures)]
        parts.append(quantised.section(Path(folder)))
    PAGE.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    print(f"wrote {PAGE}", *failures, sep="\n")
    return bool(failures)


def _rows(family: str, folder: Path, fleet: ExpertFleet, failures: list[str]) -> Iterator[str]:
    found: dict[tuple[str, torch.dtype], Agreement] = {}
    for dtype in DTYPES:
        path = folder / f"{family}-{dtype}"
        streams = reference(WRITERS[family](path, dtype=dtype))
        for mode in MODES:
            found[mode, dtype] = agreement(mode, path, dtype, streams, fleet)
            print(f"{family}, {dtype}, {mode}: {found[mode, dtype]}", flush=True)
    for mode in MODES:
        exact, low = found[mode, torch.float32], found[mode, torch.bfloat16]
        if exact.delta > FP32_LIMIT or not exact.tokens_agree or not low.low_is_as_good:
            failures.append(f"{family}, {mode}: {exact}, {low}")
        cells = [f"`{family}`", mode, f"{exact.delta:.1e}", _tokens(exact), f"{low.delta:.1e}", _tokens(low)]
        ours, theirs = low.right
        yield f"| {' | '.join(cells)} | {low.error:.2f} | {ours:.1%} | {theirs:.1%} |"


def _tokens(found: Agreement) -> str:
    return f"{found.same} of {found.steps}" + (
        f" ({found.ties} near-tie{'s' * (found.ties > 1)})" if found.ties else ""
    )


def _bit_equality(fleet: ExpertFleet, failures: list[str]) -> str:
    lines = ["## Routed experts in bf16", "", f"Gate, experts and combine of one layer on {ROWS} random rows, against"]
    lines += [
        "transformers' `grouped_mm` experts: how many numbers have the same bits. The CPU kernels add in an order of"
    ]
    lines += ["their own; with torch's products (`EXPERTMESH_ISA=none`) all have them.", ""]
    lines.append("| family | in one process | 1 router + 3 expert shards |")
    lines.append("|---|---|---|")
    for family in WRITERS:
        theirs, *ours = routed_outputs(family, fleet)
        shares = [equal_share(got, theirs) for got in ours]
        lines.append(f"| `{family}` | {' | '.join('all' if share == 1 else f'{share:.3%}' for share in shares)} |")
        if min(shares) < LEAST_EQUAL:
            failures.append(f"{family}: routed experts are not transformers' in bf16")
    return "\n".join([*lines, ""])


def introduction() -> str:
    """What the page says before its tables."""
    return f"""# Parity

Written by `make parity`; do not edit. Every model family against Hugging Face transformers {transformers.__version__}
(torch {torch.__version__.split("+")[0]}, `eager` attention, `grouped_mm` experts), on small random checkpoints with
layers of every kind that the family has. transformers has no `deepseek` (DeepSeekMoE-16B): its reference is made of
transformers' Llama attention and DeepSeek-V2 experts, with the gate of the original code.

`max Δlogit` is the largest difference of any logit, relative to the largest logit, over all positions of prompt and
answer. Tokens: at each of 64 steps of each prompt, whether the best token is transformers' own; a near-tie is a step
where its two best lie closer than 1e-5 of the logits' scale. In fp32 at most {FP32_LIMIT:g} is allowed, and no token
may differ that is not a near-tie.

In bf16 the two round at different places (ours attends over a paged cache, MLA in its absorbed form). Where that turns
a choice of a gate or of V3.2's indexer, other experts or tokens are computed and the logits are far apart, as
transformers' in bf16 then are from its own in fp32. So these are checked: `error`, the root mean square distance of a
position's logits from those of the same weights in fp32, as a multiple of transformers', both taken where they are
smallest (the lowest decile: no choice is turned there; at most {BF16_LIMIT:g}, 1 is "as good"); and `right`, the share
of positions whose best token is that of fp32 (at most {RIGHT_SLACK:.0%} of all positions fewer than transformers').
"""


if __name__ == "__main__":
    sys.exit(main())

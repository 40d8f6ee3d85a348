"""Who takes part in a comparison on this machine, and how each is started."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peers import llamacpp
from benchmarks.speed_cases import Case
from benchmarks.speed_engines import PATIENCE_S, BatchedBench, Ours, Scripted
from benchmarks.speed_figures import LLAMACPP, TRANSFORMERS, VLLM, Contender, Precision
from benchmarks.speed_plan import contenders, needed_bytes, our_config
from benchmarks.speed_roofline import Shapes
from benchmarks.speed_runs import Entry


@dataclass(frozen=True)
class Setup:
    """What is compared. ``checkpoint``: its folder; ``shards``: other numbers of expert shards than the usual one;
    ``logs``: the folder for everybody's; ``vllm_venv`` and ``llamacpp``: where these are, if they are."""

    checkpoint: Path
    cases: Sequence[Case]
    precisions: Sequence[Precision]
    peers: Sequence[str]
    shards: Sequence[int]
    vllm_venv: Path
    llamacpp: Path
    logs: Path

    def missing(self) -> dict[str, str]:
        """The peers that were asked for and are not there, and why."""
        needed = {
            VLLM: [self.vllm_venv / "bin" / "python"],
            LLAMACPP: [self.llamacpp / llamacpp.TOOL, *(self.llamacpp / llamacpp.FILES[p] for p in self.precisions)],
        }
        absent = {peer: [path for path in needed.get(peer, []) if not path.exists()] for peer in self.peers}
        found = {
            peer: f"not installed ({paths[0]} is not there); see benchmarks/README.md"
            for peer, paths in absent.items()
            if paths
        }
        if TRANSFORMERS in self.peers and importlib.util.find_spec("transformers") is None:
            found[TRANSFORMERS] = "not installed; see benchmarks/README.md"
        return found

    def contenders(self) -> list[Contender]:
        """All that are there."""
        absent = self.missing()
        return contenders(self.precisions, [peer for peer in self.peers if peer not in absent], self.shards)

    def entry(self, one: Contender, shapes: Shapes) -> Entry:
        """How it is started."""
        log = self.logs / f"{one.label}-{one.precision}.log".replace(", ", "-").replace(" ", "-")
        needed, files = needed_bytes(one, shapes.weight_bytes(one.precision)), sorted(self._weights())
        if one.engine == LLAMACPP:
            start = partial(BatchedBench, log=log, folder=self.llamacpp, precision=one.precision)
            return Entry(one, start, [self.llamacpp / llamacpp.FILES[one.precision]], needed)
        if one.engine in (TRANSFORMERS, VLLM):
            return Entry(one, self._scripted(one.engine, log), files, needed)
        config = our_config(one, self.checkpoint, max(case.streams for case in self.cases), PATIENCE_S)
        return Entry(one, partial(Ours, log=log, config=config), files, needed)

    def _weights(self) -> list[Path]:
        return list(self.checkpoint.glob("*.safetensors"))

    def _scripted(self, peer: str, log: Path) -> partial[Scripted]:
        folder = str(self.checkpoint)
        if peer == TRANSFORMERS:
            return partial(
                Scripted, log=log, python=Path(sys.executable), script="run_transformers.py", arguments=[folder]
            )
        streams, longest = max(case.streams for case in self.cases), max(case.tokens for case in self.cases)
        return partial(
            Scripted,
            log=log,
            python=self.vllm_venv.absolute() / "bin" / "python",
            script="run_vllm.py",
            arguments=[folder, str(streams), str(longest)],
            environment=vllm_environment(self.vllm_venv),
        )


def vllm_environment(venv: Path) -> dict[str, str]:
    """Its page on CPUs advises tcmalloc and Intel's OpenMP: both are taken where they are."""
    found = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), *venv.glob("lib/libiomp5.so")]
    return {"LD_PRELOAD": ":".join(str(path.absolute()) for path in found)} if found else {}

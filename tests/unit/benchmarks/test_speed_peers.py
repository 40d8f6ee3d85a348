"""What peers are asked, and how their answers are read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.peers import llamacpp
from benchmarks.speed_cases import figure, parse_case
from benchmarks.speed_engines import EngineFailed, Scripted
from benchmarks.speed_entries import Setup, vllm_environment
from benchmarks.speed_figures import LLAMACPP, VLLM, Contender
from benchmarks.speed_watch import Processes

CASE = parse_case("decode-8")
LINE = '{"pp": 128, "tg": 32, "pl": 8, "t_pp": 10.0, "t_tg": 16.0, "speed_tg": 16.0}'
PEERS = Path(llamacpp.__file__).parent


def test_llamacpp_is_asked_for_one_case() -> None:
    command = llamacpp.arguments(Path("/llama"), "int4", CASE, 2)
    assert command[0] == "/llama/build/bin/llama-batched-bench"
    words = dict(zip(command[1::2], command[2::2], strict=True))
    assert words["-m"] == "/llama/q4km.gguf"
    assert (words["-npp"], words["-ntg"], words["-npl"], words["-c"]) == ("128", "32", "8", str(8 * 160))
    assert (words["-t"], words["-tb"]) == ("2", "2")


def test_its_line_is_found_among_others_and_gives_its_own_rate() -> None:
    found = llamacpp.result(f"main: n_kv_max = 5120\n  {LINE}\n\n")
    assert found is not None
    seen = figure(CASE, llamacpp.times(CASE, found))
    assert (seen.rate, seen.ttft_s, seen.tpot_s) == (pytest.approx(16.0), 10.0, pytest.approx(0.5))
    assert llamacpp.result("nothing\n") is None


FAKE_PEER = """
import sys
sys.path.insert(0, {peers!r})
from answers import answer

def load():
    print("noise on stdout")
    def generate(prompts, new):
        print("more of it")
        return [[float(sum(ids) + step) for step in range(new)] for ids in prompts]
    return generate, {{"fake": "1"}}

answer(load)
"""


def test_a_peer_is_asked_over_pipes_whatever_it_prints(tmp_path: Path) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_PEER.format(peers=str(PEERS)))
    engine = Scripted(Processes(), tmp_path / "log", Path(sys.executable), str(script), [])
    try:
        assert engine.versions == {"fake": "1"}
        assert engine.run(parse_case("prefill-2x128"), [[1, 2], [3]]) == [[3.0], [3.0]]
        assert engine.memory() > 1 << 20
    finally:
        engine.close()
    assert engine.processes.ids() == set()
    assert "more of it" in (tmp_path / "log").read_text()


def test_a_peer_that_does_not_start_says_why(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(EngineFailed, match=r"it ended with status 1; .*no such model"):
        Scripted(Processes(), tmp_path / "log", Path(sys.executable), str(script), [])


def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path, [CASE], ["bf16"], [VLLM, LLAMACPP], [], tmp_path / "venv", tmp_path / "llama", tmp_path)


def test_peers_that_are_not_there_are_named(tmp_path: Path) -> None:
    found = setup(tmp_path).missing()
    assert set(found) == {VLLM, LLAMACPP}
    assert found[VLLM] == f"not installed ({tmp_path}/venv/bin/python is not there); see benchmarks/README.md"


def test_peers_that_are_there_take_part(tmp_path: Path) -> None:
    for path in ("venv/bin/python", "llama/build/bin/llama-batched-bench", "llama/bf16.gguf"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert setup(tmp_path).missing() == {}
    assert setup(tmp_path).contenders()[-2:] == [Contender(VLLM, "bf16"), Contender(LLAMACPP, "bf16")]


def test_vllm_gets_the_libraries_that_are_there(tmp_path: Path) -> None:
    assert "libiomp5" not in vllm_environment(tmp_path).get("LD_PRELOAD", "")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    assert str(tmp_path / "lib" / "libiomp5.so") in vllm_environment(tmp_path)["LD_PRELOAD"]

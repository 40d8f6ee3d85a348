"""``expertmesh inspect``: what it says of a model, and of what is wrong with one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.model.decoder import AttentionModel
from actors.model.errors import CheckpointError, UnsupportedModelError
from actors.model.experts import ExpertBank
from actors.model.families import load_spec
from actors.model.weight_files import locate_weights
from actors.model.weight_names import SINGLE
from actors.model.weights import Checkpoint
from cluster import inspection, model_source
from cluster.cli.inspect import run_inspect
from cluster.cli.serve import weight_bytes
from cluster.config import ConfigError, load_config
from cluster.gateway.tokenizer import TokenizerError
from cluster.hub import Hub
from cluster.inspection import bytes_by_part, inspect_model
from tests.checkpoints import write_deepseek_v3, write_mixtral, write_qwen3_moe
from tests.hub_server import HubServer, hub_server
from tests.processes import run
from tests.quantised_checkpoints import FORMATS, write_quantised
from tests.serving import tiny_model

SPLIT = {"max_shard_size": "200KB"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_deepseek_v3(path, **SPLIT, num_nextn_predict_layers=1)
    return path


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as running:
        for room in (inspection, model_source):
            monkeypatch.setattr(room, "Hub", lambda: Hub(running.url, tmp_path / "cache"))
        yield running


def asked(capsys: pytest.CaptureFixture[str], model: Path | str, memory: str | None = None) -> tuple[int, Any]:
    """Exit status, and what --json says."""
    status = run_inspect(str(model), memory, as_json=True)
    return status, json.loads(capsys.readouterr().out)


def test_a_folder(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = asked(capsys, tiny, "64KiB")
    assert status == 0
    assert told["problems"] == []
    expert = 3 * 64 * 32
    assert told["parameters"]["expert"] == expert
    assert told["parameters"]["experts"] == 2 * 16
    assert told["bytes"]["expert"]["none"] == expert * 4
    assert told["bytes"]["expert_on_disk"] == expert * 4
    assert told["bytes"]["files"] == sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert told["bytes"]["kv_per_token"] == 3 * (32 + 8) * 4
    assert told["shards"] == [{"shards": n, "experts": 32 // n} for n in (1, 2, 4, 8, 16)]
    held = 64 * 1024 // (expert * 4)
    assert told["memory"]["shards"]["none"] == -(-32 // held) == 16
    assert told["facts"]["layers"].startswith("3: 1 dense, 2 MoE; 1 for multi-token prediction: skipped")
    assert told["facts"]["context"] == "512 tokens; rotary base 10000, YaRN 8 x 64"


def test_tables(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_inspect(str(tiny), "1GiB", as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r" *family +deepseek_v3 \(MLA: 4 heads\)", line) for line in lines)
    assert any(re.match(r" *16 +2 +48\.00 KiB", line) for line in lines)
    assert any(re.match(r" *expert shards, int4 +1", line) for line in lines)
    assert not any(re.search(r"\b0\.00 (GiB|MiB)", line) for line in lines)
    assert any(re.match(r" *1 +32 +768\.00 KiB", line) for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_a_config_alone(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = asked(capsys, tiny / "config.json")
    whole = asked(capsys, tiny)[1]
    assert status == 0
    assert told["parameters"] == whole["parameters"]
    assert told["bytes"] == {**whole["bytes"], "expert_on_disk": None, "files": None}


def test_an_unsupported_family_says_what_it_can(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads((tiny / "config.json").read_text()), "model_type": "gpt9"}))
    assert run_inspect(str(file), None, as_json=False) == 1
    told = capsys.readouterr()
    assert re.search(r"num_hidden_layers +3", told.out)
    assert f"error: {file}: model_type is 'gpt9': allowed is one of " in told.err
    status, as_json = asked(capsys, file)
    assert (status, as_json["supported"], as_json["facts"]["hidden_size"]) == (1, False, 64)


def without(name: str) -> Callable[[Path], object]:
    """Take a tensor out of the file that holds it; the index goes on naming it, unless it is rewritten."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = folder / index["weight_map"].pop(name)
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def reshape(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["model.norm.weight"]
    save_file({**load_file(file), "model.norm.weight": torch.ones(65)}, file)


def cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-7])


EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no expert": (without(EXPERT), rf"1 tensor\(s\) missing: {re.escape(EXPERT)}$"),
    "no bias": (without("model.layers.1.mlp.gate.e_score_correction_bias"), r"e_score_correction_bias"),
    "another shape": (reshape, r"^error: /\S+: tensor 'model\.norm\.weight' has shape \[65\], expected \[64\]"),
    "a file is cut": (cut, r"model-00002-of-0000\d\.safetensors: is truncated"),
    "a file is gone": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), r"model-00002-of-0000\d\.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, message = DAMAGES[damage]
    break_it(folder)
    assert run_inspect(str(folder), None, as_json=False) == 1
    told = capsys.readouterr()
    assert re.search(message, told.err.strip())
    assert "deepseek_v3" in told.out, "what could be read is told as well"


def test_only_pickles(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    status, told = asked(capsys, folder)
    assert status == 1
    assert "only pickled weights" in told["problems"][0]


def test_many_missing_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("gate", "up", "down"):
        for expert in range(5):
            without(f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight")(folder)
    (problem,) = asked(capsys, folder)[1]["problems"]
    assert problem.startswith(f"{folder}: 15 tensor(s) missing: model.layers.1.mlp.experts.0.gate_proj.weight, ")
    assert problem.endswith(" and 7 more")


def test_layers_that_are_not_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({"model.layers.3.eh_proj.weight": torch.ones(4)}, folder / "mtp.safetensors")
    index["weight_map"]["model.layers.3.eh_proj.weight"] = "mtp.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    status, told = asked(capsys, folder)
    assert (status, told["problems"]) == (0, [])
    assert "1 for multi-token prediction (tensors on disk: 1): skipped" in told["facts"]["layers"]
    spec = load_spec(folder)
    parts = bytes_by_part(spec, locate_weights(folder).values())
    assert sum(parts.values()) == told["parameters"]["total"] * 4
    assert parts["expert"] == 32 * 3 * 64 * 32 * 4


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_progress_bar_ends_at_what_is_read(tmp_path: Path, replicas: int) -> None:
    tiny_model(tmp_path)
    config = load_config(None, {"model": str(tmp_path), "experts.min_replicas": replicas, "attention.replicas": 3})
    spec, read = load_spec(tmp_path), [0, 0]
    with Checkpoint(tmp_path) as checkpoint:
        AttentionModel.load(spec, checkpoint, torch.float32)
        read[0] = checkpoint.bytes_read
    with Checkpoint(tmp_path) as checkpoint:
        pairs = [(layer, expert) for layer in spec.moe_layers for expert in range(spec.moe.n_experts)]
        ExpertBank.load(spec, checkpoint, pairs, torch.float32)
        read[1] = checkpoint.bytes_read
    assert weight_bytes(config) == 3 * read[0] + replicas * read[1]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With matrices that the groups of every format divide."""
    path = tmp_path_factory.mktemp("wide")
    write_qwen3_moe(path, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=1, mlp_only_layers=[])
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_checkpoints(wide: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is missing, and a shard holds exactly what is said."""
    folder = tmp_path / "quantised"
    write_quantised(wide, folder, name)
    status, told = asked(capsys, folder)
    assert (status, told["problems"]) == (0, [])
    spec = load_spec(folder)
    with Checkpoint(folder) as checkpoint:
        bank = ExpertBank.load(spec, checkpoint, [(0, 0)], torch.float32)
    assert told["bytes"]["expert"] == {"none": bank.nbytes}
    stems = [name.removesuffix("weight") for name in spec.names.expert(0, 0)]
    (entries,) = locate_weights(folder).values()
    on_disk = sum(e.end - e.begin for name, e in entries.items() if name.startswith(tuple(stems)))
    assert told["bytes"]["expert_on_disk"] == on_disk


def test_a_quantised_checkpoint_without_scales_is_not_whole(wide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    write_quantised(wide, folder, "fp8")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.3.down_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    (problem,) = inspect_model(str(folder)).problems
    assert "experts.3.down_proj.weight' is torch.float8_e4m3fn, but there is no model.layers.0.mlp.experts.3" in problem


Tensors = dict[str, Tensor]
DOWN = "model.layers.0.mlp.experts.3.down_proj."
BLOCK = "model.layers.0.mlp.experts."


def fuse(tensors: Tensors) -> None:
    parts = {p: [tensors.pop(f"{BLOCK}{e}.{p}_proj.weight") for e in range(8)] for p in ("gate", "up", "down")}
    tensors[f"{BLOCK}gate_up_proj"] = torch.cat((torch.stack(parts["gate"]), torch.stack(parts["up"])), dim=1)
    tensors[f"{BLOCK}down_proj"] = torch.stack(parts["down"])


def fused(damage: Callable[[Tensors], object]) -> Callable[[Tensors], object]:
    def fuse_and_damage(tensors: Tensors) -> None:
        fuse(tensors)
        damage(tensors)

    return fuse_and_damage


def shortened(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()})


def cast(name: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


UNREADABLE: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("gptq", lambda t: t.pop(f"{DOWN}qzeros"), rf"1 tensor\(s\) missing: {DOWN}qzeros"),
    ("gptq act order", lambda t: t.pop(f"{DOWN}g_idx"), rf"1 tensor\(s\) missing: {DOWN}g_idx"),
    ("gptq", shortened(f"{DOWN}qweight"), r"down_proj.qweight' has shape \[15, 128\], expected \[16, 128\]"),
    ("awq", shortened(f"{DOWN}scales"), r"down_proj.scales' has shape \[3, 128\], expected \[4, 128\]"),
    ("fp8", shortened(f"{DOWN}weight"), r"down_proj.weight' has shape \[127, 128\], expected \[128, 128\]"),
    ("fp8", cast(f"{DOWN}weight_scale_inv", torch.float64), r"down_proj.weight_scale_inv' is torch.float64, expected"),
    ("pack int4 group", lambda t: t.pop(f"{DOWN}weight_shape"), rf"1 tensor\(s\) missing: {DOWN}weight_shape"),
    ("int8 channel", lambda t: t.pop(f"{DOWN}weight_scale"), r"down_proj.weight' is torch.int8, but there is no"),
    ("plain", cast(f"{DOWN}weight", torch.float8_e4m3fn), r"down_proj.weight' is torch.float8_e4m3fn, expected one of"),
    ("plain", fused(lambda t: t.pop(f"{BLOCK}down_proj")), rf"1 tensor\(s\) missing: {BLOCK}down_proj"),
    ("plain", fused(shortened(f"{BLOCK}down_proj")), r"experts.down_proj' has shape \[7, 128, 128\], expected \[8, "),
    ("plain", fused(cast(f"{BLOCK}gate_up_proj", torch.int8)), r"experts.gate_up_proj' is torch.int8, expected one"),
]


@pytest.mark.parametrize(("name", "damage", "message"), UNREADABLE)
def test_what_the_loader_refuses_is_said_before(
    wide: Path, tmp_path: Path, name: str, damage: Callable[[Tensors], object], message: str
) -> None:
    folder = tmp_path / "damaged"
    if name == "plain":
        shutil.copytree(wide, folder)
    else:
        write_quantised(wide, folder, name)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    found = inspect_model(str(folder))
    assert re.search(message, " ".join(found.problems))
    assert found.spec is not None
    with Checkpoint(folder) as checkpoint, pytest.raises(CheckpointError):
        ExpertBank.load(found.spec, checkpoint, [(0, 3)], torch.float32)


def test_serve_looks_at_the_headers_too(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    weight_bytes(load_config(None, {"model": str(tmp_path)}))
    tensors = load_file(tmp_path / "model.safetensors")
    layer = load_spec(tmp_path).moe_layers[0]
    name = f"model.layers.{layer}.mlp.experts.0.down_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: 1 tensor\(s\) missing: {re.escape(name)}"):
        weight_bytes(load_config(None, {"model": str(tmp_path)}))


def test_serve_refuses_a_configuration_with_fewer_layers(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] - 1}))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: \d+ tensor\(s\) such as .* layer\(s\) behind"):
        weight_bytes(load_config(None, {"model": str(tmp_path)}))


def test_serve_looks_at_all_else_before_it_fetches_weights(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model(folder)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = json.loads(good["config.json"])
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    for refused, keys, message in (
        ({"model_type": "llama"}, {}, "model_type is 'llama'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, {}, "bitsandbytes"),
        ({"quantization_config": fp8}, {"experts.quantization": "int8"}, "checkpoint is quantised already"),
        ({}, {"experts.shards": 4096}, "experts.shards: 4096; allowed are 1 to "),
    ):
        server.publish("org/tiny", {**good, "config.json": json.dumps({**said, **refused}).encode()})
        with pytest.raises((ConfigError, UnsupportedModelError), match=message):
            weight_bytes(load_config(None, {"model": "org/tiny", **keys}))
    server.publish("org/tiny", {**good, "tokenizer.json": b"{"})
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer"):
        weight_bytes(load_config(None, {"model": "org/tiny"}))
    assert "model.safetensors" not in server.fetched()
    server.publish("org/tiny", good)
    weight_bytes(load_config(None, {"model": "org/tiny"}))
    assert "model.safetensors" in server.fetched()


def test_fused_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_qwen3_moe(tmp_path)
    apart = asked(capsys, tmp_path)[1]
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in (0, 2):
        block = f"model.layers.{layer}.mlp.experts"
        parts = {p: [tensors.pop(f"{block}.{e}.{p}_proj.weight") for e in range(8)] for p in ("gate", "up", "down")}
        both = torch.cat((torch.stack(parts["gate"]), torch.stack(parts["up"])), dim=1)
        tensors |= {f"{block}.gate_up_proj": both, f"{block}.down_proj": torch.stack(parts["down"])}
    save_file(tensors, tmp_path / "model.safetensors")
    status, fused = asked(capsys, tmp_path)
    assert (status, fused["problems"]) == (0, [])
    assert fused["bytes"]["expert_on_disk"] == apart["bytes"]["expert_on_disk"] == 3 * 64 * 32 * 4
    assert bytes_by_part(load_spec(tmp_path), locate_weights(tmp_path).values())["expert"] == 16 * 3 * 64 * 32 * 4


def test_fused_experts_of_mixtral_as_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whose names, apart, are others."""
    model = write_mixtral(tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / SINGLE)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / SINGLE)
    status, told = asked(capsys, tmp_path)
    assert (status, told["problems"]) == (0, [])
    assert told["bytes"]["expert_on_disk"] == 3 * 64 * 96 * 4


def test_a_repository_costs_its_config_and_index(server: HubServer, tiny: Path) -> None:
    commit = server.publish_folder("org/tiny", tiny)
    found = inspect_model("org/tiny")
    assert found.model == f"org/tiny@{commit}"
    assert found.problems == ()
    assert found.sizes is not None
    assert found.sizes.disk == sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert sorted(server.fetched()) == ["config.json", "model.safetensors.index.json"]


def test_a_repository_whose_index_lacks_tensors(server: HubServer, folder: Path) -> None:
    without(EXPERT)(folder)
    commit = server.publish_folder("org/tiny", folder)
    assert inspect_model("org/tiny").problems == (f"org/tiny@{commit}: 1 tensor(s) missing: {EXPERT}",)


def test_what_cannot_be_looked_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, message in (
        ("/no/such", "'/no/such' is not a folder"),
        (str(folder / "model.safetensors.index.json.gone"), "is not a folder"),
    ):
        assert run_inspect(model, None, as_json=False) == 1
        assert message in capsys.readouterr().err
    assert run_inspect(str(folder), "a lot", as_json=False) == 1
    assert "--memory: write a size as a number of bytes or like 512MiB" in capsys.readouterr().err
    for bare in ("80", "0", " 1048575 "):
        assert run_inspect(str(folder), bare, as_json=False) == 1
        assert f"--memory: {bare.strip()} bytes; write a unit, as in 80GiB" in capsys.readouterr().err
    assert run_inspect(str(folder), "1048576", as_json=False) == 0
    capsys.readouterr()
    (folder / "config.json").write_text("[]")
    assert run_inspect(str(folder), None, as_json=False) == 1
    assert "config.json: holds list, expected a JSON object" in capsys.readouterr().err
    (folder / "config.json").write_text("[" * 100_000)
    assert run_inspect(str(folder), None, as_json=False) == 1
    assert "config.json: is not valid JSON: maximum recursion depth" in capsys.readouterr().err
    (folder / "config.json").unlink()
    assert run_inspect(str(folder), None, as_json=False) == 1
    assert "has no config.json" in capsys.readouterr().err


def test_the_command(tiny: Path) -> None:
    result = run("inspect", str(tiny), "--memory", "2GiB")
    assert result.returncode == 0, result.stderr
    assert re.search(r"attention shard, none +\d.* tokens of KV cache", result.stdout)

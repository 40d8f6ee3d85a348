"""Tensors that a checkpoint holds beyond its description: which of them cannot be passed over in silence."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

from .quant.layout import Headers, is_quantized
from .spec import MoEDecoderSpec

MTP_FAMILIES = ("deepseek_v3", "deepseek_v32", "glm4_moe")
"""Their released checkpoints hold layers for multi-token prediction behind the others."""

MTP_MODULES = ("eh_proj", "enorm", "hnorm")
"""Such a layer has them and no other has."""

BIASES = ("bias", "e_score_correction_bias")
_MODULE = re.compile(r"(?:self_attn\.(?P<attention>q_norm|k_norm|indexer)|\w+\.(?P<shared>shared_expert\w*))\.")
_KEYS = {
    "q_norm": "use_qk_norm",
    "k_norm": "use_qk_norm",
    "indexer": "index_topk",
    "shared_experts": "n_shared_experts",
    "shared_expert": "shared_expert_intermediate_size",
    "shared_expert_gate": "shared_expert_intermediate_size",
    "e_score_correction_bias": "topk_method",
}
"""Of config.json: what a module, or a bias, is there by."""


def skipped_tensors(spec: MoEDecoderSpec, names: Iterable[str]) -> int:
    """How many of ``names`` belong to layers for multi-token prediction, which are not read."""
    behind = _behind(spec, names)
    return sum(len(tensors) for tensors in behind.values() if _predicts(spec, tensors))


def surplus_faults(
    spec: MoEDecoderSpec, headers: Headers, names: Iterable[str], known: Collection[str]
) -> Iterator[tuple[str, str]]:
    """What cannot be meant by a checkpoint with these ``names``, of which the model reads the tensors ``known`` (as
    they are called unquantised): (a tensor's name, what is wrong). Layers behind the last one, unless they are for
    multi-token prediction, and in what is read biases, norms, shared experts and indexers that config.json says are not
    there. Others that nobody reads, such as buffers, are no fault."""
    names = list(names)
    yield from _layer_faults(spec, _behind(spec, names))
    modules = {name.rpartition(".")[0] for name in known}
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        if name not in known and (reason := _unasked(spec, headers, name, modules)) is not None:
            by_reason[reason].append(name)
    for reason, found in by_reason.items():
        yield found[0], f"{len(found)} tensor(s) such as {found[0]!r}: expected none in a {reason}"


def _behind(spec: MoEDecoderSpec, names: Iterable[str]) -> dict[int, list[str]]:
    """The tensors of layers behind the last one, by layer."""
    numbered = re.compile(re.escape(spec.names.layer_prefix) + r"\.(\d{1,9})\.")
    behind: defaultdict[int, list[str]] = defaultdict(list)
    for name in names:
        match = numbered.match(name)
        if match is not None and int(match[1]) >= spec.n_layers:
            behind[int(match[1])].append(name)
    return dict(sorted(behind.items()))


def _predicts(spec: MoEDecoderSpec, tensors: Iterable[str]) -> bool:
    """Whether the tensors of a layer are those of one for multi-token prediction."""
    modules = {name.removeprefix(f"{spec.names.layer_prefix}.").split(".")[1] for name in tensors}
    return spec.model_type in MTP_FAMILIES and not modules.isdisjoint(MTP_MODULES)


def _layer_faults(spec: MoEDecoderSpec, behind: dict[int, list[str]]) -> Iterator[tuple[str, str]]:
    """A configuration that was saved anew has lost ``num_nextn_predict_layers``: then the tensors alone tell."""
    strange = [layer for layer, tensors in behind.items() if not _predicts(spec, tensors)]
    if not strange and (not spec.n_mtp or len(behind) <= spec.n_mtp):
        return
    refused = strange or list(behind)
    first, count = behind[refused[0]][0], sum(len(behind[layer]) for layer in refused)
    wanted = f"num_hidden_layers = {spec.n_layers}"
    if spec.model_type in MTP_FAMILIES:
        wanted += f" and num_nextn_predict_layers = {spec.n_mtp}, the latter's with {', '.join(MTP_MODULES)}"
    yield (
        first,
        f"{count} tensor(s) such as {first!r} are of {len(refused)} layer(s) behind those of config.json: "
        f"expected no more than {wanted}",
    )


def _unasked(spec: MoEDecoderSpec, headers: Headers, name: str, modules: Collection[str]) -> str | None:
    """Why ``name`` should not be there; None: nothing speaks against it."""
    module, _, end = name.rpartition(".")
    if end in BIASES and module in modules:
        if _padding(spec, headers, module, end):
            return None
        return _model(spec, _bias_key(spec, module, end))
    layer, _, rest = name.removeprefix(f"{spec.names.layer_prefix}.").partition(".")
    match = _MODULE.match(rest)
    if match is None or module in modules or not layer.isdecimal() or int(layer[:9]) >= spec.n_layers:
        return None
    found = match["attention"] or match["shared"]
    return _model(spec, _KEYS.get(found))


def _model(spec: MoEDecoderSpec, key: str | None) -> str:
    """Which model has no such tensor."""
    return f"model of type {spec.model_type!r}" + ("" if key is None else f" with {key} as config.json has it")


def _padding(spec: MoEDecoderSpec, headers: Headers, module: str, end: str) -> bool:
    """GPTQ's first writers gave every matrix a bias of zeros, whatever the model (as vLLM, which skips them, knows)."""
    scheme = spec.quantization
    gptq = scheme is not None and scheme.method == "gptq" and end == "bias"
    return gptq and scheme is not None and is_quantized(headers, scheme, f"{module}.weight")


def _bias_key(spec: MoEDecoderSpec, module: str, end: str) -> str | None:
    """What could give ``module`` a bias; None: nothing."""
    if end in _KEYS or not module.endswith("_proj"):
        return _KEYS.get(end)
    if ".self_attn." not in module:
        return "mlp_bias"
    if spec.attn.qkv_bias:
        return None
    return "qkv_bias" if spec.model_type == "qwen2_moe" else "attention_bias"

"""The gate's checks of an adapter: its config, the names and shapes of its tensors, and what the engine can wrap.

A tensor that would land nowhere is the field's most common silent failure (the engine loads it, applies nothing, and
the base answers): every tensor must name a module that the base has, under the very name that the engine will look for.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loradock_adapters.base import BaseModel, is_embedding
from loradock_adapters.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint
from loradock_adapters.engine_rules import (
    FLOAT_DTYPES,
    MAX_LM_HEAD_VOCAB,
    SUCCESSORS,
    TOWER_PARTS,
    VLLM_VERSION,
    EngineLimits,
    architecture_rules,
    ladder_rank,
)
from loradock_adapters.filetypes import INITIAL_FOLDERS
from loradock_adapters.findings import Findings
from loradock_adapters.gate_config import judge_config
from loradock_adapters.gate_targets import judge_targets
from loradock_adapters.lora_keys import FACTORS, LoraKey, Part, RankPatterns, parse_key
from loradock_adapters.safetensors_header import TensorInfo


def judge_lora(checkpoint: Checkpoint, base: BaseModel | None, limits: EngineLimits, findings: Findings) -> int | None:
    """Adds everything there is to say about an adapter; returns its largest rank, None where the config has none."""
    config = checkpoint.config
    ranks = judge_config(config, findings) if config else None
    _judge_files(checkpoint, findings)
    keys = [parse_key(tensor) for tensor in checkpoint.tensors]
    _judge_parts(keys, config, findings)
    _judge_magnitudes(keys, config, findings)
    factors = _pairs(keys, checkpoint.tensors, findings)
    if ranks is not None:
        _judge_factor_ranks(factors, ranks, findings)
        _judge_limits(ranks, limits, findings)
    if base is None:
        findings.remark("base_not_given", "not compared with a base model: none was named", "base")
    else:
        _judge_architecture(base, limits, findings)
        _judge_against_base(keys, factors, checkpoint, base, limits, findings)
        _judge_origin(checkpoint, base, findings)
    return ranks.largest if ranks is not None else None


def _judge_files(checkpoint: Checkpoint, findings: Findings) -> None:
    names = {
        n for n in checkpoint.file_names if n.endswith(".safetensors") and n.partition("/")[0] not in INITIAL_FOLDERS
    }
    others = sorted(names - {ADAPTER_WEIGHTS})
    findings.refuse_all(
        "two_checkpoints",
        "weights beside those of the adapter, which would not be served",
        others,
        "publish the adapter and the merged model as two models",
    )
    if ADAPTER_WEIGHTS not in checkpoint.file_names:
        findings.refuse("weights_missing", "the adapter's weights are missing", ADAPTER_WEIGHTS)


def _judge_parts(keys: list[LoraKey], config: Mapping[str, Any], findings: Findings) -> None:
    """Tensors that are not a pair of LoRA factors, by what they are."""
    by_part: dict[Part, list[str]] = defaultdict(list)
    for key in keys:
        by_part[key.part].append(key.tensor)
    kept_bases = [key for key in keys if key.part == "base_layer"]
    ignored = [
        key.tensor
        for key in kept_bases
        if key.tensor.endswith(("embed_tokens.base_layer.weight", "lm_head.base_layer.weight"))
    ]
    findings.remark_all(
        "base_matrix_inside",
        "the base's own matrix, saved beside the adapter; the engine ignores it",
        ignored,
        "save_pretrained(..., save_embedding_layers=False) makes the file smaller",
    )
    findings.refuse_all(
        "unsupported_tensor",
        "not a tensor of a LoRA adapter; the engine fails on it",
        [*by_part["unknown"], *(key.tensor for key in kept_bases if key.tensor not in ignored)],
        "save the adapter with PEFT's save_pretrained",
    )
    if not config.get("use_dora"):
        findings.detour_all("dora", "a DoRA magnitude; it cannot be swapped", by_part["magnitude"])
    if not config.get("lora_bias"):
        findings.detour_all("lora_bias", "a bias beside a LoRA matrix; it cannot be swapped", by_part["lora_bias"])
    if config.get("bias", "none") == "none":
        findings.detour_all("trained_bias", "a trained bias; it cannot be swapped", by_part["bias"])
    if not config.get("trainable_token_indices"):
        findings.detour_all(
            "trainable_tokens", "retrained token rows; they cannot be swapped", by_part["trained_tokens"]
        )
    if not config.get("modules_to_save"):
        findings.detour_all(
            "full_tensor",
            "a whole matrix of the base; it cannot be swapped",
            by_part["full"],
            "if it was not trained, save with save_embedding_layers=False",
        )
    if not keys or not any(key.part in FACTORS for key in keys):
        message = "no LoRA tensor inside: nothing was trained, or it was saved from the wrong process"
        findings.refuse("no_lora_tensors", message, ADAPTER_WEIGHTS)


def _judge_magnitudes(keys: list[LoraKey], config: Mapping[str, Any], findings: Findings) -> None:
    """PEFT fills in a DoRA magnitude that is missing with the base's own norm: it would merge another function."""
    if not config.get("use_dora"):
        return
    factored = dict.fromkeys(key.module for key in keys if key.part in FACTORS)
    with_magnitude = {key.module for key in keys if key.part == "magnitude"}
    findings.refuse_all(
        "dora_magnitude_missing",
        "the config says DoRA, and the module's magnitude vector is missing",
        [module for module in factored if module not in with_magnitude],
        "save the adapter with PEFT's save_pretrained; if it is a plain LoRA, set use_dora to false",
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both factors of one module's change: B @ A has the module's shape, or its transpose for an embedding."""

    module: str
    embedding: bool
    a: TensorInfo  # [rank, in]
    b: TensorInfo  # [out, rank]


def _pairs(keys: list[LoraKey], tensors: Mapping[str, TensorInfo], findings: Findings) -> list[_Pair]:
    found: dict[tuple[str, bool], dict[str, LoraKey]] = defaultdict(dict)
    twice: list[str] = []
    for key in keys:
        if key.part in FACTORS:
            factors = found[key.module, key.part.startswith("embedding")]
            if key.part[-1] in factors:
                twice.append(key.tensor)
            factors[key.part[-1]] = key
    findings.refuse_all("tensor_twice", "the same factor under two names", twice)
    pairs = []
    lonely: list[str] = []
    empty: list[str] = []
    for (module, embedding), factors in found.items():
        empty += [key.tensor for key in factors.values() if 0 in tensors[key.tensor].shape]
        if len(factors) == 2:
            pairs.append(_Pair(module, embedding, tensors[factors["A"].tensor], tensors[factors["B"].tensor]))
        else:
            lonely.append(next(iter(factors.values())).tensor)
    findings.refuse_all("factor_missing", "one of the factors A and B without the other", lonely)
    findings.refuse_all("empty_tensor", "a matrix without values, as a process that holds none of them saves it", empty)
    wrong_dtype = [pair.module for pair in pairs if not {pair.a.dtype, pair.b.dtype} <= FLOAT_DTYPES]
    findings.refuse_all("adapter_dtype", f"adapter matrices are one of {', '.join(sorted(FLOAT_DTYPES))}", wrong_dtype)
    return [pair for pair in pairs if 0 not in pair.a.shape + pair.b.shape]


def _judge_factor_ranks(pairs: list[_Pair], ranks: RankPatterns, findings: Findings) -> None:
    """The engine scales by the config's rank, so a tensor of another rank would be scaled wrongly."""
    for pair in pairs:
        if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
            continue  # said by the shape check
        rank = ranks.rank_of(pair.module)
        if not pair.a.shape[0] == pair.b.shape[1] == rank:
            message = f"A has rank {pair.a.shape[0]} and B {pair.b.shape[1]}, the config says {rank}"
            findings.refuse("rank_mismatch", message, pair.module)


def _judge_limits(ranks: RankPatterns, limits: EngineLimits, findings: Findings) -> None:
    rank = ranks.largest
    if rank <= limits.max_lora_rank:
        return
    step = ladder_rank(rank)
    fix = f"serve with engine.max_lora_rank: {step}" if step else "no engine setting reaches that rank; 512 is the last"
    message = f"rank {rank} is over the engine's max_lora_rank {limits.max_lora_rank}"
    findings.detour("rank_over_limit", message, f"{ADAPTER_CONFIG}: r", fix)


def _judge_architecture(base: BaseModel, limits: EngineLimits, findings: Findings) -> None:
    if not limits.enable_lora:
        findings.detour("engine_without_lora", "the base's engine runs without LoRA", "base")
        return
    for name in SUCCESSORS.keys() & set(base.architectures):  # nor merged: no engine has the base
        message = f"vLLM {VLLM_VERSION} does not list {name}"
        findings.refuse("architecture_unknown", message, "base", SUCCESSORS[name])
        return
    rules = [architecture_rules(name) for name in base.architectures]
    if not any(rule is not None and rule.lora for rule in rules):
        names = ", ".join(base.architectures) or "the base's architecture"
        findings.detour("architecture_without_lora", f"the engine has no LoRA for {names}", "base")


def _judge_against_base(
    keys: list[LoraKey],
    pairs: list[_Pair],
    checkpoint: Checkpoint,
    base: BaseModel,
    limits: EngineLimits,
    findings: Findings,
) -> None:
    if not base.known:
        message = "the base's modules are not known here, so names and shapes cannot be checked"
        findings.refuse("base_unknown", message, base.model_id or "base")
        return
    factored = {pair.module for pair in pairs}
    touched = dict.fromkeys(key.module for key in keys if key.part != "unknown")
    beyond = [m for m in touched if base.is_beyond_layers(m)]
    findings.refuse_all("layer_beyond_base", f"the base has {base.layers} layers, from 0 on", beyond)
    strangers = [m for m in touched if not (m in base.modules if m in factored else base.has(m)) and m not in beyond]
    findings.refuse_all("module_not_in_base", f"the base has no such module{_near(strangers, base)}", strangers)
    for pair in pairs:
        if pair.module in base.modules:
            _judge_shape(pair, base, findings)
    whole = {
        key: checkpoint.tensors[key.tensor]
        for key in keys
        if key.part in ("full", "base_layer") and key.module in base.modules
    }
    if base.exact:
        findings.refuse_all(
            "lora_bias_without_bias",
            "a bias beside a LoRA matrix, for a layer of the base that has none which it could be merged into",
            [k.tensor for k in keys if k.part == "lora_bias" and f"{k.module}.bias" not in base.tensor_names],
        )
    grown = _grown_vocabulary(whole, base)
    if grown is not None:
        message = f"a vocabulary of {grown}, the base's is {base.vocab_size}: embedding and output matrix are replaced"
        fix = "publish the tokenizer with its new tokens beside the adapter"
        findings.detour("vocab_resized", message, ADAPTER_WEIGHTS, fix)
    for key, tensor in whole.items():
        if not (grown is not None and is_embedding(key.module) and tensor.shape[:1] == (grown,)):
            _judge_full_shape(key, tensor, base, findings)
    _judge_embeddings(pairs, base, findings)
    if base.multimodal:
        _judge_outside(pairs, base, limits, findings)
    if not strangers and not beyond:  # else what is missing is there under another name
        judge_targets(checkpoint.config, {key.module for key in keys if key.part in FACTORS}, base, findings)


def _judge_outside(pairs: list[_Pair], base: BaseModel, limits: EngineLimits, findings: Findings) -> None:
    """What is outside the language model: applied where the architecture can and the engine is told to."""
    outside = [pair.module for pair in pairs if not TOWER_PARTS.isdisjoint(pair.module.split("."))]
    can = any(rules is not None and rules.tower for rules in map(architecture_rules, base.architectures))
    if can and limits.tower_lora:
        return
    message = "the engine leaves out what is outside the language model"
    if can:
        fix = "serve with engine.enable_tower_connector_lora: true, or target the language model's modules alone"
        findings.detour_all("tower_lora", message, outside, fix)
    else:
        findings.detour_all("tower_lora", message, outside)


def _judge_shape(pair: _Pair, base: BaseModel, findings: Findings) -> None:
    out_features, in_features = base.modules[pair.module]
    if pair.embedding:  # the base's [vocab, hidden] is looked up, not multiplied: A [rank, vocab], B [hidden, rank]
        out_features, in_features = in_features, out_features
    if pair.embedding != (is_embedding(pair.module) and not pair.module.endswith(("lm_head", "embed_out"))):
        kind = "an embedding" if pair.embedding else "a linear layer"
        findings.refuse("factor_kind", f"factors of {kind} on a module that is none", pair.module)
        return
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        findings.refuse(
            "shape_mismatch", f"A {list(pair.a.shape)} and B {list(pair.b.shape)}: not matrices", pair.module
        )
        return
    if pair.a.shape[1] != in_features:
        message = f"A takes {pair.a.shape[1]} inputs, the base's module {in_features}"
        findings.refuse("vocab_mismatch" if pair.embedding else "shape_mismatch", message, pair.module)
    if pair.b.shape[0] != out_features:
        message = f"B gives {pair.b.shape[0]} outputs, the base's module {out_features}"
        over_vocabulary = is_embedding(pair.module) and not pair.embedding
        findings.refuse("vocab_mismatch" if over_vocabulary else "shape_mismatch", message, pair.module)


def _grown_vocabulary(whole: Mapping[LoraKey, TensorInfo], base: BaseModel) -> int | None:
    """The new vocabulary where both matrices over it were retrained whole, at one size that is not the base's."""
    sizes = set()
    outputs = 0
    for key, tensor in whole.items():
        if key.part == "full" and is_embedding(key.module) and len(tensor.shape) == 2:
            if tensor.shape[1] != base.modules[key.module][1]:
                return None
            sizes.add(tensor.shape[0])
            outputs += key.module.endswith("lm_head")
    return sizes.pop() if len(sizes) == 1 and outputs == 1 and sizes != {base.vocab_size} and _both(whole) else None


def _both(whole: Mapping[LoraKey, TensorInfo]) -> bool:
    return sum(key.part == "full" and is_embedding(key.module) for key in whole) == 2


def _judge_full_shape(key: LoraKey, tensor: TensorInfo, base: BaseModel, findings: Findings) -> None:
    expected = base.modules[key.module]
    if tensor.shape not in (expected, expected[::-1]):
        message = f"a matrix of {list(tensor.shape)}, the base's is {list(expected)}"
        findings.refuse("vocab_mismatch" if is_embedding(key.module) else "shape_mismatch", message, key.tensor)


def _judge_embeddings(pairs: list[_Pair], base: BaseModel, findings: Findings) -> None:
    allowed = {m for name in base.architectures if (rules := architecture_rules(name)) for m in rules.embedding_modules}
    for pair in pairs:
        name = pair.module.rpartition(".")[2]
        if pair.module not in base.modules or not is_embedding(pair.module):
            continue
        if name not in allowed:
            architecture = ", ".join(base.architectures)
            findings.detour("embedding_lora", f"the engine cannot wrap {name} of {architecture}", pair.module)
        elif name == "lm_head" and base.modules[pair.module][0] > MAX_LM_HEAD_VOCAB:
            message = f"a vocabulary of {base.modules[pair.module][0]} is over the engine's limit {MAX_LM_HEAD_VOCAB}"
            findings.detour("vocab_over_limit", message, pair.module)


def _judge_origin(checkpoint: Checkpoint, base: BaseModel, findings: Findings) -> None:
    """Whether it was trained on the served base, by name; gate_passport.py looks at the weights' hash where both are
    known."""
    passport = checkpoint.passport
    if passport is not None and passport.base.weights_sha256 is not None and base.weights_sha256 is not None:
        return
    trained_on = checkpoint.config.get("base_model_name_or_path")
    if isinstance(trained_on, str) and base.model_id is not None:
        names = [name.rstrip("/").rpartition("/")[2] for name in (trained_on, base.model_id)]
        if names[0] != names[1]:
            message = f"trained on {ascii(names[0])[:80]}, served on {ascii(names[1])[:80]}: make sure it is the same"
            findings.remark("base_name", message, ADAPTER_CONFIG)


def _near(strangers: list[str], base: BaseModel) -> str:
    """What the base calls the first of them, where it has it under another prefix."""
    for stranger in strangers[:1]:
        parts = stranger.split(".")
        for start in range(len(parts) - 1):
            tail = "." + ".".join(parts[start:])
            match = next((module for module in base.modules if f".{module}".endswith(tail)), None)
            if match is not None:
                return f"; it calls it {match}"
    return ""

"""The gate's checks of adapter_config.json by itself: types, features that the engine lacks, patterns.

Whoever reads the file takes its settings as they are: vLLM scales by `use_rslora: "false"` as if it were true. So every
setting has to have the type that PEFT gives it. Does not know the tensors (gate_lora.py) nor the base.
"""

from collections.abc import Callable, Mapping
from typing import Any

from loradock_adapters.checkpoint import ADAPTER_CONFIG
from loradock_adapters.engine_rules import FEATURES, KNOWN_SETTINGS
from loradock_adapters.findings import Findings
from loradock_adapters.lora_keys import RankPatterns, is_literal, is_safe_pattern

_MAX_PATTERNS = 20_000
_MAX_WILD_PATTERNS = 200
_MAX_TEXT_CHARS = 4096
_MAX_RANK = 1 << 20
_MAX_ALPHA = 1e9


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT_CHARS


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_texts(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_counts(value: object) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(item) is int and item >= 0 for item in value))


def _is_token_rows(value: object) -> bool:
    return _is_counts(value) or (isinstance(value, dict) and all(_is_counts(rows) for rows in value.values()))


def _is_init(value: object) -> bool:
    return isinstance(value, bool | str)


def _is_bias(value: object) -> bool:
    return value in ("none", "all", "lora_only")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


# null stands for "not set" everywhere.
_TYPES: tuple[tuple[Callable[[object], bool], str, tuple[str, ...]], ...] = (
    (
        _is_flag,
        "true or false",
        (
            "use_rslora",
            "use_dora",
            "use_qalora",
            "lora_bias",
            "fan_in_fan_out",
            "inference_mode",
            "ensure_weight_tying",
        ),
    ),
    (_is_text, "a text", ("base_model_name_or_path", "revision", "task_type", "peft_version", "megatron_core")),
    (_is_texts, "a text or a list of texts", ("exclude_modules", "modules_to_save", "layers_pattern")),
    (_is_texts, "a list of texts", ("target_parameters",)),
    (_is_counts, "a number or a list of numbers from 0 on", ("layers_to_transform", "alora_invocation_tokens")),
    (_is_token_rows, "a list of token ids, or a map of modules to such lists", ("trainable_token_indices",)),
    (_is_init, "true, false or the name of an initialisation", ("init_lora_weights",)),
    (_is_bias, '"none", "all" or "lora_only"', ("bias",)),
    (_is_share, "a number from 0 to 1", ("lora_dropout",)),
    (_is_object, "an object", ("auto_mapping", "megatron_config", "runtime_config")),
)


def judge_config(config: Mapping[str, Any], findings: Findings) -> RankPatterns | None:
    """Adds everything there is to say about the config; returns the ranks that it gives, None where `r` is none."""
    _judge_method(config, findings)
    wrong = _judge_types(config, findings)
    for feature in FEATURES:
        if feature.setting not in wrong and feature.used(config.get(feature.setting)):
            add = findings.detour if feature.outcome == "dedicated" else findings.refuse
            add(feature.code, feature.message, f"{ADAPTER_CONFIG}: {feature.setting}", feature.fix)
    unknown = sorted(ascii(key)[1:-1][:60] for key in config.keys() - KNOWN_SETTINGS if config[key])
    findings.remark_all("unknown_setting", "a setting that the engine ignores", unknown)
    _judge_alpha(config, findings)
    if not isinstance(config.get("target_modules"), str) and not _is_named(config.get("target_modules")):
        message = "target_modules is neither a list of names nor a pattern"
        findings.refuse("target_modules", message, f"{ADAPTER_CONFIG}: target_modules")
    _judge_patterns(config, "alpha_pattern", _is_alpha, findings)
    patterns_fine = _judge_patterns(config, "rank_pattern", _is_rank, findings)
    rank = config.get("r")
    if not _is_rank(rank):
        message = f"r is {ascii(rank)[:40]}, not a whole number from 1 to {_MAX_RANK}"
        findings.refuse("rank", message, f"{ADAPTER_CONFIG}: r")
        return None
    return RankPatterns(int(config["r"]), config.get("rank_pattern") or {} if patterns_fine else {})


def _judge_method(config: Mapping[str, Any], findings: Findings) -> None:
    peft_type = config.get("peft_type", "LORA")
    if peft_type != "LORA":
        message = f"{ascii(peft_type)[:40]} adapters are not served, only LORA"
        findings.refuse("peft_type", message, f"{ADAPTER_CONFIG}: peft_type")


def _judge_types(config: Mapping[str, Any], findings: Findings) -> set[str]:
    """The settings whose values are not what PEFT would have written."""
    wrong = set()
    for fits, expected, settings in _TYPES:
        for setting in settings:
            value = config.get(setting)
            if value is not None and not fits(value):
                wrong.add(setting)
                message = f"{ascii(value)[:40]} is not {expected}"
                findings.refuse("config_type", message, f"{ADAPTER_CONFIG}: {setting}")
    return wrong


def _judge_alpha(config: Mapping[str, Any], findings: Findings) -> None:
    alpha = config.get("lora_alpha")
    if not _is_number(alpha):  # zero is a number: the adapter then changes nothing, which is said of its values
        message = f"lora_alpha is {ascii(alpha)[:40]}, not a number of up to {_MAX_ALPHA:g}"
        findings.refuse("lora_alpha", message, f"{ADAPTER_CONFIG}: lora_alpha")


def _is_named(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value <= _MAX_RANK


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MAX_ALPHA <= value <= _MAX_ALPHA


def _is_alpha(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


def _judge_patterns(
    config: Mapping[str, Any], setting: str, fits: Callable[[object], bool], findings: Findings
) -> bool:
    patterns = config.get(setting)
    where = f"{ADAPTER_CONFIG}: {setting}"
    if patterns is None:
        return True
    if not isinstance(patterns, Mapping):
        message = f"{setting} is not a map of module patterns to numbers"
        findings.refuse("rank_pattern" if setting == "rank_pattern" else "alpha_pattern", message, where)
        return False
    if len(patterns) > _MAX_PATTERNS or sum(not is_literal(pattern) for pattern in patterns) > _MAX_WILD_PATTERNS:
        message = f"more than {_MAX_PATTERNS} patterns, or {_MAX_WILD_PATTERNS} with wildcards"
        findings.refuse("too_many_patterns", message, where)
        return False
    unsafe = [ascii(pattern)[1:-1][:80] for pattern in patterns if not is_safe_pattern(pattern)]
    message = "a pattern that could take very long to match"
    findings.refuse_all("pattern_unsafe", message, [f"{where}: {pattern}" for pattern in unsafe])
    wrong = [ascii(pattern)[1:-1][:80] for pattern, value in patterns.items() if not fits(value)]
    findings.refuse_all(
        "rank_pattern" if setting == "rank_pattern" else "alpha_pattern",
        "not a positive number",
        [f"{where}: {pattern}" for pattern in wrong],
    )
    return not unsafe and not wrong

"""What a server on this base, machine and registry would choose for itself: the facts for `sizing.advise`, gathered.

`loradock serve` starts its engine with it, `loradock plan` and `GET /v1/plan` show it. Reads the registry; changes
nothing.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any

from loradock_adapters.engine_rules import MAX_LM_HEAD_VOCAB, ArchitectureRules, architecture_rules
from loradock_adapters.registry import Registry, Version
from loradock_serve import sizing
from loradock_serve.base import ServedBase
from loradock_serve.config import ServeConfig
from loradock_serve.engine_command import Machine
from loradock_serve.sizing import Advice, Known, Memory, Published, Wish

log = logging.getLogger("loradock.gateway")

RECENT_HOURS = 7 * 24
RANK_OVER_LIMIT = "rank_over_limit"
"""The gate's word for an adapter that would be shared but for its rank."""


def hour_of(seconds: float) -> int:
    """Whole hours since 1970, UTC."""
    return int(seconds) // 3600


def make_plan(config: ServeConfig, base: ServedBase, machine: Machine, registry: Registry | None) -> Advice | None:
    """What the base's engine is started with, and why; None where vLLM puts no adapters on its architecture.

    `registry` is None where there is none yet.
    """
    rules = [architecture_rules(name) for name in base.facts.architectures]
    able = [rule for rule in rules if rule is not None and rule.lora]
    if not able:
        return None
    known = _known(registry, base, config.dedicated.max_engines) if registry is not None else Known()
    engine = config.engine
    max_num_seqs = engine.vllm_arguments.get("max_num_seqs")
    wish = Wish(
        engine.max_loras,
        engine.max_cpu_loras,
        engine.max_lora_rank,
        max_num_seqs if isinstance(max_num_seqs, int) else None,
    )
    return sizing.advise(known, adapter_shapes(base, able), _memory(config, machine), wish)


def adapter_shapes(base: ServedBase, rules: Iterable[ArchitectureRules]) -> list[tuple[int, int]]:
    """(out, in) of every module that an engine keeps slots for: all linear ones, and the embeddings that it wraps."""
    wrapped = frozenset[str]().union(*(rule.embedding_modules for rule in rules))
    return [shape for name, shape in base.facts.modules.items() if _has_slots(base, name, shape, wrapped)]


def _has_slots(base: ServedBase, name: str, shape: tuple[int, int], wrapped: frozenset[str]) -> bool:
    if name not in base.facts.embedding_modules:
        return True
    last = name.rpartition(".")[2]
    return last in wrapped and not (last == "lm_head" and shape[0] > MAX_LM_HEAD_VOCAB)


def _memory(config: ServeConfig, machine: Machine) -> Memory:
    of_adapters = config.engine.vllm_arguments.get("lora_dtype", "auto")
    wide = config.engine.dtype == "float32" and of_adapters == "auto"
    return Memory(machine.memory_bytes, machine.host_bytes, 4 if wide else 2, beside_gpu=machine.device == "gpu")


def _known(registry: Registry, base: ServedBase, dedicated_engines: int) -> Known:
    current = [version for version in registry.models() if _is_of(version, base)]
    now = hour_of(time.time())
    return Known(
        shared=_published(version for version in current if version.placement == "shared"),
        older_ranks={rank for rank, of in registry.older_ranks() if of is None or of.is_same(base.identity)},
        over_rank=_published(version for version in current if _only_its_rank(version)),
        traffic=registry.traffic.between(now - RECENT_HOURS, now),
        dedicated_engines=dedicated_engines,
    )


def _is_of(version: Version, base: ServedBase) -> bool:
    """Versions of which nobody said their base are claimed for the one that is served."""
    return version.kind == "lora" and (version.base is None or version.base.is_same(base.identity))


def _only_its_rank(version: Version) -> bool:
    codes = [reason.code for reason in version.reasons]
    return version.placement == "dedicated" and codes == [RANK_OVER_LIMIT]


def _published(versions: Iterable[Version]) -> list[Published]:
    return [Published(version.name, version.rank, version.size_bytes) for version in versions if version.rank]


def plan_json(advice: Advice) -> dict[str, Any]:
    """As `GET /v1/plan` and `loradock plan --json` give it."""
    sized = advice.sizing
    return {
        "max_loras": sized.max_loras,
        "max_cpu_loras": sized.max_cpu_loras,
        "max_lora_rank": sized.max_lora_rank,
        "slot_bytes": sized.slot_bytes,
        "slots_bytes": advice.slots_bytes,
        "cache_bytes": advice.cache_bytes,
        "reasons": advice.reasons,
        "notes": list(advice.notes),
    }


def say(advice: Advice) -> None:
    """The plan in the gateway's log: what was chosen, why, and what it costs."""
    sized, mib = advice.sizing, 1024**2
    log.info(
        "%d adapter slots (%s) of rank %d (%s): %.1f MiB each, %.1f MiB in all",
        sized.max_loras,
        advice.reasons["max_loras"],
        sized.max_lora_rank,
        advice.reasons["max_lora_rank"],
        sized.slot_bytes / mib,
        advice.slots_bytes / mib,
    )
    log.info(
        "%d adapters in host memory (%s), about %.1f MiB",
        sized.max_cpu_loras,
        advice.reasons["max_cpu_loras"],
        advice.cache_bytes / mib,
    )
    for note in advice.notes:
        log.warning("%s", note)

"""The third repair: PiSSA, OLoRA, CorDA and LoRA-GA adapters as plain LoRA, where the initial adapter is at hand.

They train against W - s·B0·A0, so over the base itself the change is s·(B·A - B0·A0), which is a LoRA of twice the
rank: A' = [A; A0], B' = [B, -B0]. That is what PEFT's own conversion writes (LoraModel.subtract_mutated_init); it is
done here on the files, so that no model need be loaded. Scaling stays s by the same changes to the config as PEFT's.

LoftQ is not among them: it trains against a quantised base, and what its factors leave over is lost.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from loradock_adapters.lora_keys import parse_key
from loradock_adapters.tensor_files import CHUNK_BYTES, TensorStream, pieces

_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")


def is_convertible(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's initialisation is one that the initial adapter undoes."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(_CONVERTIBLE)


def why_not(
    trained: Mapping[str, TensorStream], initial: Mapping[str, TensorStream], config: Mapping[str, Any]
) -> str | None:
    """What keeps these two from being subtracted; None where nothing does."""
    if config.get("use_dora"):
        return "DoRA beside such an initialisation is not converted"
    factors = {name: tensor for name, tensor in trained.items() if _is_factor(name)}
    first = {name: tensor for name, tensor in initial.items() if _is_factor(name)}
    if factors.keys() != first.keys():
        lonely = sorted(factors.keys() ^ first.keys())[0]
        return f"the initial adapter has not the same tensors; the first in one of the two only is {lonely}"
    for name, tensor in factors.items():
        if (tensor.shape, tensor.dtype) != (first[name].shape, first[name].dtype):
            mine, other = (f"{t.dtype} {list(t.shape)}" for t in (tensor, first[name]))
            return f"{name} is {mine}, and {other} in the initial adapter"
    if all(_equal(tensor, first[name]) for name, tensor in factors.items()):
        return "the initial adapter is the trained one; it has to be saved before training"
    return None


def converted_tensors(
    trained: Mapping[str, TensorStream], initial: Mapping[str, TensorStream]
) -> dict[str, TensorStream]:
    """The factors of twice the rank; everything else as it is."""
    result = dict(trained)
    for name, tensor in trained.items():
        part = parse_key(name).part
        if part in ("A", "embedding_A"):
            result[name] = _stacked(tensor, initial[name])
        elif part in ("B", "embedding_B"):
            result[name] = _side_by_side(tensor, initial[name])
    return result


def converted_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Twice the rank at the same scaling: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    growth = 2**0.5 if config.get("use_rslora") else 2
    changed = {**config, "init_lora_weights": True, "r": config["r"] * 2, "lora_alpha": config["lora_alpha"] * growth}
    if ranks := config.get("rank_pattern"):
        changed["rank_pattern"] = {pattern: 2 * rank for pattern, rank in ranks.items()}
    if alphas := config.get("alpha_pattern"):
        changed["alpha_pattern"] = {pattern: alpha * growth for pattern, alpha in alphas.items()}
    for setting in ("corda_config", "lora_ga_config", "eva_config"):
        if setting in changed:
            changed[setting] = None
    return changed


def _is_factor(name: str) -> bool:
    return parse_key(name).part in ("A", "B", "embedding_A", "embedding_B")


def _equal(one: TensorStream, other: TensorStream) -> bool:
    return all(a == b for a, b in zip(one.read(CHUNK_BYTES), other.read(CHUNK_BYTES), strict=True))


def _stacked(one: TensorStream, other: TensorStream) -> TensorStream:
    """[2 rank, in]: the rows of one, then those of the other."""

    def read(piece_bytes: int) -> Iterator[bytes]:
        def rows() -> Iterator[bytes]:
            yield from one.read(CHUNK_BYTES)
            yield from other.read(CHUNK_BYTES)

        return pieces(rows(), piece_bytes)

    return TensorStream(one.dtype, (one.shape[0] * 2, *one.shape[1:]), read)


def _side_by_side(one: TensorStream, other: TensorStream) -> TensorStream:
    """[out, 2 rank]: every row of one, and behind it that of the other with its signs turned."""
    row_bytes = one.shape[1] * one.item_bytes
    block_bytes = max(1, CHUNK_BYTES // row_bytes) * row_bytes

    def read(piece_bytes: int) -> Iterator[bytes]:
        def rows() -> Iterator[bytes]:
            for mine, others in zip(one.read(block_bytes), other.read(block_bytes), strict=True):
                negative = _negated(others, one.item_bytes)
                starts = range(0, len(mine), row_bytes)
                yield b"".join(
                    part
                    for start in starts
                    for part in (mine[start : start + row_bytes], negative[start : start + row_bytes])
                )

        return pieces(rows(), piece_bytes)

    return TensorStream(one.dtype, (one.shape[0], one.shape[1] * 2), read)


def _negated(raw: bytes, item_bytes: int) -> bytes:
    """Floating-point numbers with the sign bit, the highest of their last byte, turned."""
    turned = bytearray(raw)
    last = turned[item_bytes - 1 :: item_bytes]
    turned[item_bytes - 1 :: item_bytes] = last.translate(_TURN)
    return bytes(turned)


_TURN = bytes(byte ^ 0x80 for byte in range(256))

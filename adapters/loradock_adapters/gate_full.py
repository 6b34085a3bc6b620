"""The gate's checks of a full model: a config that an engine can start from, weights that are complete, a tokenizer."""

from collections.abc import Mapping

from loradock_adapters.base_shapes import derived_modules
from loradock_adapters.checkpoint import MODEL_CONFIG, MODEL_INDEX, Checkpoint
from loradock_adapters.engine_rules import SUCCESSORS, VLLM_VERSION, architecture_rules
from loradock_adapters.findings import Findings

_HEAD = "ForSequenceClassification"
_TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"})


def judge_full(checkpoint: Checkpoint, findings: Findings) -> None:
    """Adds everything there is to say about a full model."""
    if checkpoint.config:
        _judge_architecture(checkpoint.config, findings)
    _judge_weights(checkpoint, findings)
    if not _TOKENIZER_FILES & checkpoint.file_names:
        findings.refuse(
            "tokenizer_missing",
            "an engine of its own cannot start without a tokenizer",
            "tokenizer.json",
            "save the tokenizer beside the weights: tokenizer.save_pretrained(path)",
        )
    findings.detour(
        "full_weights",
        "complete weights are served by an engine of their own",
        MODEL_CONFIG,
        fix="to share the base's engine: `loradock extract` makes an adapter where the change is of low rank",
    )


def _judge_architecture(config: Mapping[str, object], findings: Findings) -> None:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        findings.refuse("architectures_missing", "the config names no architectures", MODEL_CONFIG)
        return
    heads = [name for name in names if name.endswith(_HEAD)]
    if heads:
        findings.detour(
            "classification_head",
            "a classification head: an engine of its own serves it through POST /classify; it writes no text",
            f"{MODEL_CONFIG}: architectures",
        )
    # The engine puts a head on any language model that it knows.
    known = [*names, *(name.removesuffix(_HEAD) + "ForCausalLM" for name in heads)]
    if not any(architecture_rules(name) for name in known):
        message = f"vLLM {VLLM_VERSION} does not list {ascii(names[0])[:80]}"
        fix = SUCCESSORS.get(names[0], "")
        findings.refuse("architecture_unknown", message, f"{MODEL_CONFIG}: architectures", fix)


def _judge_weights(checkpoint: Checkpoint, findings: Findings) -> None:
    files = sorted(name for name in checkpoint.file_names if name.endswith(".safetensors"))
    if not files:
        findings.refuse("weights_missing", "no safetensors file", "model.safetensors", "save_pretrained() writes it")
        return
    _judge_shards(checkpoint, files, findings)
    unmerged = [name for name in checkpoint.tensors if "lora_" in name or ".base_layer." in name]
    findings.refuse_all(
        "not_merged",
        "a tensor of an adapter inside full weights",
        unmerged,
        "publish the adapter alone, or merge_and_unload() before saving",
    )
    if len(checkpoint.shards) == len(files) and not checkpoint.config.get("quantization_config"):
        _judge_shapes(checkpoint, findings)


def _judge_shards(checkpoint: Checkpoint, files: list[str], findings: Findings) -> None:
    """The index and the shards say the same: nothing missing, nothing twice, nothing that would not be loaded."""
    holders: dict[str, str] = {}
    for file, tensors in checkpoint.shards.items():
        findings.refuse_all(
            "tensor_twice", "in two weight files", [f"{file}: {name}" for name in tensors if name in holders]
        )
        holders |= dict.fromkeys(tensors, file)
    weight_map = checkpoint.weight_map
    if weight_map is None:
        if len(files) > 1:
            findings.refuse("index_missing", f"{len(files)} weight files without an index", MODEL_INDEX)
        return
    absent = sorted(set(weight_map.values()) - set(files))
    findings.refuse_all(
        "shard_missing", "named in the index, but not there", [ascii(name)[1:-1][:120] for name in absent]
    )
    misplaced = [
        f"{file}: {name}"
        for name, file in weight_map.items()
        if file in checkpoint.shards and holders.get(name) != file
    ]
    findings.refuse_all("index_disagrees", "not in the file that the index names", misplaced)
    unlisted = [name for name in holders if name not in weight_map]
    findings.refuse_all("index_disagrees", "in a file, but not in the index", unlisted)


def _judge_shapes(checkpoint: Checkpoint, findings: Findings) -> None:
    """For the families whose shapes follow from the config: all there, each as large as it must be."""
    expected = derived_modules(checkpoint.config)
    tensors = checkpoint.tensors
    found = {name.removesuffix(".weight"): info.shape for name, info in tensors.items() if name.endswith(".weight")}
    if not expected.keys() & found.keys():
        return  # another naming (a bare GPT-2 has no `transformer.`): the engine knows it, we do not
    names = checkpoint.config.get("architectures")
    has_head = isinstance(names, list) and any(isinstance(name, str) and name.endswith(_HEAD) for name in names)
    optional = {"lm_head"} if has_head or checkpoint.config.get("tie_word_embeddings", True) else set()
    missing = [module for module in expected if module not in found and module not in optional]
    findings.refuse_all("weights_missing", "the config asks for it, but no file has it", missing)
    for module, shape in expected.items():
        if module in found and found[module] not in (shape, shape[::-1]):
            message = f"a matrix of {list(found[module])}, the config asks for {list(shape)}"
            findings.refuse("shape_mismatch", message, module)

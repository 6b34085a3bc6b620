"""Merge an adapter into its base with PEFT, for an engine of its own: `python -m loradock_serve.merge BASE ADAPTER
OUT`.

A process of its own, so that its memory (the base once, on the CPU, in the checkpoint's own format) is gone afterwards.
The tokenizer comes from the adapter's directory where it has one, else from the base. `OUT` is complete or the status
is not 0.
"""

import sys
from pathlib import Path


def merge(base: str, adapter: Path, out: Path) -> None:
    """Write full weights and a tokenizer to `out`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", low_cpu_mem_usage=True)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(out))
    own_tokenizer = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    AutoTokenizer.from_pretrained(str(adapter) if own_tokenizer else base).save_pretrained(str(out))
    if (adapter / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(str(adapter)).save_pretrained(str(out))


if __name__ == "__main__":
    merge(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

"""A merge by PEFT itself, for what merge_plan.py does not know: the base is in memory once, in its own format."""

from pathlib import Path


def merge_with_peft(base: str, adapter: Path, out: Path) -> None:
    """Write the merged weights, their config and the base's tokenizer to `out`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", low_cpu_mem_usage=True)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(out))
    AutoTokenizer.from_pretrained(base).save_pretrained(str(out))

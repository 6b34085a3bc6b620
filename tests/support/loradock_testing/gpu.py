"""What tests on a CUDA device need to know of the machine: whether there is one, and who uses its memory.

Starts no CUDA context in the test's own process: engines measure the free memory of the GPU while they start, and a
context beside them would be counted.
"""

import subprocess
from importlib.metadata import PackageNotFoundError, version


def why_not() -> str | None:
    """Why tests that need a CUDA device and a CUDA build of vLLM cannot run here; None where they can."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False"
    try:
        version("vllm")
    except PackageNotFoundError:
        return "a CUDA device, but no CUDA build of vLLM: install the extra `gpu` (make install GPU=1)"
    return None


def memory_used_share() -> float:
    """Of the fullest visible GPU's memory, by all processes together: what the driver says."""
    query = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    pairs = [[float(number) for number in line.split(",")] for line in lines if line.strip()]
    return max(used / total for used, total in pairs)

"""Makes the engines of a gateway, not yet started: the base's own, and one for each model that cannot share it.

Each start of one gets a fresh socket. Knows what a config says of engines, and nothing of requests.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from loradock_serve.base import ServedBase
from loradock_serve.config import ServeConfig
from loradock_serve.engine import AttachedEngine, Engine, EnginePlan
from loradock_serve.engine_command import Machine, base_command, dedicated_command
from loradock_serve.sizing import LoraSizing


def weights_bytes_a_gpu(config: ServeConfig, base: ServedBase) -> int:
    """Bytes of the base's matrices on each GPU, 16 bits a value, from its shapes; 0 where these are not known."""
    values = sum(out * inner for out, inner in base.facts.modules.values())
    arguments = config.engine.vllm_arguments
    gpus = [arguments.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size")]
    return 2 * values // max(1, math.prod(n for n in gpus if isinstance(n, int)))


@dataclass(frozen=True)
class EngineFactory:
    """See the top of the file."""

    config: ServeConfig
    machine: Machine
    base_model: ServedBase
    lora: LoraSizing | None
    socket_dir: Path

    def base(self) -> Engine | AttachedEngine:
        """The base's engine: ours, or the one that the config names."""
        config = self.config
        if config.engine.url is not None:
            return AttachedEngine(config.engine.url)
        return Engine(
            EnginePlan(
                label="the base's engine",
                make_command=lambda socket: base_command(
                    self.base_model.model,
                    socket,
                    config.engine,
                    config.dedicated,
                    self.machine,
                    self.lora,
                    weights_bytes_a_gpu(config, self.base_model),
                ),
                socket_dir=self.socket_dir,
                log_path=config.data_dir / "logs" / "engine-base.log",
                start_timeout_s=config.engine.start_timeout_s,
                needs_corrected_lora=self.lora is not None,
                restarts=True,
            )
        )

    def dedicated(self, digest: str, name: str, directory: Path) -> Engine:
        """An engine for one model that shares none."""
        config = self.config
        return Engine(
            EnginePlan(
                label=f"the engine of {name!r}",
                make_command=lambda socket: dedicated_command(
                    directory, digest, socket, config.engine, config.dedicated, self.machine
                ),
                socket_dir=self.socket_dir,
                log_path=config.data_dir / "logs" / f"engine-{digest.removeprefix('sha256:')[:16]}.log",
                start_timeout_s=config.dedicated.start_timeout_s,
                needs_corrected_lora=False,
                restarts=False,
            )
        )

"""What `loradock serve` can be told: one frozen object from a YAML file, flags and the environment.

Checked whole before anything starts: unknown keys, vLLM arguments that the pinned version does not have, and what
Loradock sets itself, all reported at once. Knows nothing of processes or HTTP.
"""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from loradock_adapters.errors import InvalidSourceError, RegistryError
from loradock_adapters.registry_url import parse_url
from loradock_adapters.source_ref import check_prefix
from loradock_adapters.strict_config import explain, read_yaml
from loradock_serve import engine_args
from loradock_serve.core_list import parse_cores
from loradock_serve.errors import ServeConfigError

LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
"""The rank ladder of vLLM 0.32: every slot is allocated at one of these."""


def _checked_prefix(prefix: str) -> str:
    try:
        return check_prefix(prefix)
    except InvalidSourceError as error:
        raise ValueError(str(error)) from error


SourcePrefix = Annotated[str, AfterValidator(_checked_prefix)]
SourcePrefixes = Annotated[tuple[SourcePrefix, ...], Field(strict=False)]


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/loradock`, which is `~/.local/share/loradock` where that is not set."""
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "loradock"


class EngineConfig(BaseModel):
    """The engine that holds the base. Any other key is an argument of vLLM's server, dashes as underscores."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    url: str | None = None
    """Attach to an engine that something else runs: `http://host:port` or `unix:///path/to/socket`. Default: start
    one."""
    max_loras: Annotated[int, Field(ge=1)] | None = None
    """Slots: adapters that can be in one batch. Minimum 1. Default: chosen from memory."""
    max_cpu_loras: Annotated[int, Field(ge=1)] | None = None
    """Adapters kept in host memory, slots included. Minimum `max_loras`. Default: four times the slots, at least 64."""
    packed_adapters_gib: Annotated[float, Field(ge=0)] = 16.0
    """GiB of disk below `data_dir/packed` for adapters rewritten in the form that engines read fastest; the least
    recently used go first. 0 rewrites none. Default 16."""
    max_lora_rank: LoraRank | None = None
    """The largest rank a slot can take. Default: 64."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Longest sequence in tokens, prompt and answer together. Default: the base's own limit."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the weights in memory. Default `auto`: a 16-bit checkpoint's own, 16 bits for a float32 one."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds from the start of the process until it must be ready (a first start may download weights). Default
    1800."""
    hold_s: Annotated[float, Field(ge=0)] = 120.0
    """Seconds a request is held while the base engine starts or restarts, before it is answered 503. Default 120."""
    cpu_cores: str | None = None
    """CPU builds only: the cores of the engine's compute threads, as "0-3" or "0,2" (or vLLM's own words for it).
    Default: all this process may use."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    """CPU builds only: GiB of memory for the KV cache. Default: an eighth of the machine's memory, at most 4."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = engine_args.problems_with(self.model_extra or {}, "engine")
        if self.cpu_cores is not None:
            try:
                parse_cores(self.cpu_cores)
            except ValueError as error:
                problems.append(f"engine.cpu_cores: {error}")
        if self.max_loras is not None and self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            problems.append(f"engine.max_cpu_loras: {self.max_cpu_loras} is below engine.max_loras, {self.max_loras}")
        if self.url is not None and not self.url.startswith(("http://", "https://", "unix://")):
            problems.append(f"engine.url: {self.url!r} starts with none of http://, https://, unix://")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def vllm_arguments(self) -> Mapping[str, Any]:
        """The keys that are vLLM's own, as written."""
        return self.model_extra or {}


class DedicatedConfig(BaseModel):
    """Engines of their own for what cannot be hot-swapped: full models, DoRA, `modules_to_save`, over-rank adapters."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_engines: Annotated[int, Field(ge=0)] = 1
    """How many may run at once beside the base. 0 refuses such models. Default 1."""
    idle_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Seconds without a request after which one is stopped. Default 900."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds a request for one is held while it starts, before it is answered 503. Default 600."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """GPU builds only: share of the GPU's memory for each. With `devices` unset the base gets what is left. Default
    0.3."""
    devices: str | None = None
    """GPU builds only: CUDA_VISIBLE_DEVICES of these engines, as "1" or "2,3". Default: the base's devices."""
    engine: Mapping[str, Any] = {}
    """vLLM arguments for these engines, over those of the `engine` section that are not about adapters."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = engine_args.problems_with(self.engine, "dedicated.engine")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class AdmissionConfig(BaseModel):
    """Who goes next where more is asked than the engines can run at once (`admission.py`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_wait_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds after which a waiting request comes before newer ones, whatever their priority, and a slot is drained for
    its adapter. Default 10."""
    max_queue: Annotated[int, Field(ge=1)] = 4096
    """Requests that may wait for one engine; more are answered 429. As many more may wait for engines that are starting
    and adapters that are being read. Minimum 1. Default 4096."""
    max_queue_gib: Annotated[float, Field(gt=0)] = 1.0
    """Memory for the bodies of all requests that wait, in GiB; more are answered 429. Default 1."""
    max_n: Annotated[int, Field(ge=1)] = 128
    """Answers that one request may want for each of its prompts (`n`). Minimum 1. Default 128, as at OpenAI."""
    max_queue_per_tenant: Annotated[int, Field(ge=1)] = 1024
    """Requests of one tenant that may wait for one engine; more are answered 429. Minimum 1. Default 1024."""
    weights: Mapping[str, Annotated[float, Field(gt=0)]] = {}
    """Shares of tenants, as `{research: 2.5}`: one with 2 is served twice as much as one with 1 while both wait. Each
    over 0. Default: 1 for each."""
    gather_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds for which requests for an adapter gather before it takes a slot, where slots are too few. Default 0."""


class UploadsConfig(BaseModel):
    """What publishers may upload before they publish it. A publisher is the holder of a key, or anybody without one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_unpublished_bytes: Annotated[int, Field(ge=1024)] = 512 * 1024**3
    """Bytes that one publisher may have uploaded, or begun to, and not published. Minimum 1024. Default 512 GiB."""
    max_unpublished_files: Annotated[int, Field(ge=1)] = 4096
    """Files of the same. Minimum 1. Default 4096."""
    max_parallel: Annotated[int, Field(ge=1)] = 16
    """Files that one publisher may send at the same moment; more are answered 429. Minimum 1. Default 16."""
    stall_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds in which 64 KiB of an upload have to come, else its connection is closed; what came is kept. Default
    30."""
    keep_s: Annotated[float, Field(gt=0)] = 86400.0
    """Seconds after which what came, and nobody continued or published, is removed. Default 86400, a day."""


class SourcesConfig(BaseModel):
    """What the server fetches itself, for who publishes and at request time (`source_jobs.py`, `lazy_models.py`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    push: SourcePrefixes = ("hf://",)
    """Prefixes of sources that `loradock push` may name. Default: all of the Hub, as a stranger sees it; nothing else,
    since an object store is read with this server's own credentials."""
    lazy: SourcePrefixes = ()
    """Prefixes of sources that a request may name as its `model`. Default: none."""
    hub_url: str | None = None
    """The Hub's address. Default: the environment's HF_ENDPOINT, else https://huggingface.co."""
    server_token: bool = False
    """Whether the Hub sees this server's own token (HF_TOKEN) where a publisher sent none, and in requests. Whoever may
    publish, or send a request, can then have everything below the allowed prefixes that it opens. Default false."""
    max_bytes: Annotated[int, Field(ge=1)] = 256 * 1024**3
    """Bytes that one source may have in all; a single file `max_upload_bytes`. Minimum 1. Default 256 GiB."""
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds that one fetch may take. Default 3600."""
    max_running: Annotated[int, Field(ge=1, le=64)] = 4
    """Fetches at the same time. From 1 to 64. Default 4."""
    max_waiting: Annotated[int, Field(ge=0)] = 60
    """Fetches that may wait for their turn; more are answered 429. Minimum 0. Default 60."""
    lazy_wait_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that a request waits for a source that it named, before it is answered 503. Minimum 0. Default 30."""
    lazy_lookups_a_minute: Annotated[int, Field(ge=1)] = 60
    """Unknown sources that requests may make the server look for in a minute, all together; more are answered 429.
    Minimum 1. Default 60."""
    lazy_recheck_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds after which a branch is looked at anew; the known version answers meanwhile. Default 300."""
    miss_ttl_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds for which a source that is not there, or was refused, is not asked for again. Default 60."""


def _expanded(path: Path) -> Path:
    return path.expanduser()


DirectoryPath = Annotated[Path, Field(strict=False), AfterValidator(_expanded)]


class ServeConfig(BaseModel):
    """Everything `loradock serve` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    base: str
    """The base model: a Hub id, a checkpoint directory, or a run directory of `loradock train`."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs an admin key. Default 127.0.0.1."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port to listen on; 0 takes a free one and prints it. Default 8080."""
    data_dir: DirectoryPath = Field(default_factory=default_data_dir)
    """Where uploads, the registry and engine logs live; in a file relative to it. Default `~/.local/share/loradock`."""
    registry_url: SecretStr | None = None
    """The registry that several gateways share: `postgresql://user:password@host/database`. The environment's
    LORADOCK_REGISTRY_URL is the other way. Default: an SQLite file in `data_dir`."""
    blobs_url: str | None = None
    """Where uploads lie that several gateways share: `s3://bucket/prefix`, or another URL that fsspec knows. Default:
    `data_dir` alone."""
    blobs_cache_gib: Annotated[float, Field(ge=0)] = 100.0
    """With `blobs_url`: GiB of `data_dir` for copies of uploads. The least recently used go first, never one that an
    engine may read. Minimum 0 keeps what is in use. Default 100."""
    admin_key_file: DirectoryPath | None = None
    """A file whose content is the admin key; in a file relative to it. The environment's LORADOCK_ADMIN_KEY is the
    other way. Default: none."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds after which a request that is still running is cut off. Default 3600."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024**2
    """Largest JSON body in bytes. Minimum 1024. Default 64 MiB."""
    max_upload_bytes: Annotated[int, Field(ge=1024)] = 256 * 1024**3
    """Largest single uploaded file in bytes. Minimum 1024. Default 256 GiB."""
    uploads: UploadsConfig = UploadsConfig()
    """What publishers may upload before they publish it."""
    engine: EngineConfig = EngineConfig()
    """The engine that holds the base."""
    dedicated: DedicatedConfig = DedicatedConfig()
    """Engines for what cannot be hot-swapped."""
    admission: AdmissionConfig = AdmissionConfig()
    """Who goes next where more is asked than the engines can run at once."""

    sources: SourcesConfig = SourcesConfig()
    """What the server fetches itself, from the Hub and from object stores."""

    @field_validator("registry_url")
    @classmethod
    def _readable(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            try:
                parse_url(url.get_secret_value())
            except RegistryError as error:
                raise ValueError(str(error)) from None
        return url

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> ServeConfig:
    """The configuration from a file (or none) with the flags in `overrides` on top; None there means "not given".

    Raises ServeConfigError with every problem, or UsageError where the file cannot be read.
    """
    data = read_yaml(path) if path is not None else {}
    data |= {key: value for key, value in overrides.items() if value is not None}
    if path is not None and isinstance(data.get("base"), str) and "base" not in {k for k, v in overrides.items() if v}:
        data["base"] = _beside(path, data["base"])
    for key in ("data_dir", "admin_key_file"):
        if path is not None and isinstance(data.get(key), str) and overrides.get(key) is None:
            data[key] = str(path.parent.absolute() / Path(data[key]).expanduser())
    try:
        return ServeConfig.model_validate(data)
    except ValidationError as error:
        lines = [_flatten(line) for problem in explain(error, ServeConfig) for line in problem.splitlines()]
        lines += [line for line in _vllm_problems(data) if line not in lines]
        where = f"{path}" if path is not None else "the command line"
        raise ServeConfigError(
            f"{where} has {len(lines)} problem(s):\n" + "\n".join(f"  {line}" for line in lines)
        ) from error


def _beside(path: Path, base: str) -> str:
    """A relative directory in a config file is meant from that file; anything else (a Hub id) stays as it is."""
    candidate = path.parent / base
    return str(candidate) if base.startswith(".") or candidate.is_dir() else base


def _vllm_problems(data: Mapping[str, Any]) -> list[str]:
    """Complaints about vLLM arguments, which pydantic does not come to while one of our own keys is wrong."""
    engine, dedicated = data.get("engine"), data.get("dedicated")
    extra = {k: v for k, v in engine.items() if k not in EngineConfig.model_fields} if isinstance(engine, dict) else {}
    inner = dedicated.get("engine") if isinstance(dedicated, dict) else None
    return [
        *engine_args.problems_with(extra, "engine"),
        *engine_args.problems_with(inner if isinstance(inner, dict) else {}, "dedicated.engine"),
    ]


def _flatten(line: str) -> str:
    # Our own validators name the whole key; pydantic puts the section's name before it once more.
    for section in ("engine: engine.", "dedicated: dedicated."):
        if line.startswith(section):
            return line.removeprefix(section.split(" ")[0]).strip()
    return line


def read_admin_key(config: ServeConfig, environment: Mapping[str, str]) -> str | None:
    """The admin key from the environment or the file; None where there is neither.

    Raises ServeConfigError when the address is not loopback and there is no key, or the file is empty or unreadable.
    """
    key = environment.get("LORADOCK_ADMIN_KEY", "").strip()
    if not key and config.admin_key_file is not None:
        try:
            key = config.admin_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServeConfigError(f"admin_key_file: {config.admin_key_file} cannot be read: {error}") from error
        if not key:
            raise ServeConfigError(f"admin_key_file: {config.admin_key_file} is empty; put a long random key in it")
    if not key and not config.is_loopback:
        raise ServeConfigError(
            f"host {config.host} is reachable from other machines, and there is no admin key: set LORADOCK_ADMIN_KEY "
            "or admin_key_file, or listen on 127.0.0.1"
        )
    return key or None

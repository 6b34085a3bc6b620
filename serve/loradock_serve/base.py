"""The base that `loradock serve` was told to serve: where it is, what it is called, and what comes with it.

A directory, a run directory of the trainer, or a Hub id (then only its small files are fetched here; the engine
fetches the weights itself). Loads no weights.
"""

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loradock_adapters.base import BaseModel, base_from
from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.checkpoint import read_checkpoint, resolve_checkpoint_dir
from loradock_adapters.errors import LoradockError, NotFoundError
from loradock_adapters.passport import weights_sha256
from loradock_serve.errors import HubUnreachableError, ServeConfigError
from loradock_serve.rewrite import Behaviour

SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True)
class ServedBase:
    """Everything the gateway needs to know of the base."""

    name: str
    """The last part of its id or path: what it answers under, beside `base`."""
    model: str
    """What the engine is given: a directory, or the Hub id."""
    facts: BaseModel
    behaviour: Behaviour
    """Its own chat template and stop tokens, to tell an adapter's from."""
    identity: BaseIdentity
    """What is remembered with the versions that are published for it."""
    directory: Path
    """Where its files are on this machine, of the revision that is served."""

    @property
    def source(self) -> str:
        """What to read weights from: the directory, once it has them (the engine fetches those of a Hub id)."""
        return str(self.directory) if any(self.directory.glob("*.safetensors")) else self.model


class WeightsHash:
    """The hash of a base's weights, computed when the first passport asks for it: many gigabytes take many seconds.

    Call it in a thread. None for a base without local weights (a Hub id), whose passports cannot be compared.
    """

    def __init__(self, model: str) -> None:
        self._directory = Path(model)
        self._turn = threading.Lock()
        self._value: str | None = None

    def __call__(self) -> str | None:
        """As `loradock_adapters.passport.weights_sha256` has it."""
        with self._turn:
            if self._value is None and self._directory.is_dir():
                with contextlib.suppress(NotFoundError):
                    self._value = weights_sha256(self._directory)
            return self._value


def find_base(base: str, revision: str | None = None) -> ServedBase:
    """The base at a path or Hub id.

    Raises ServeConfigError where there is none, or it cannot be read; HubUnreachableError where later there may be one.
    """
    path = Path(base).expanduser()
    try:
        if path.is_dir():
            directory = resolve_checkpoint_dir(path).resolve()
            model, name = str(directory), path.resolve().name
        else:
            directory = _fetch_small_files(base, revision)
            model, name = base, PurePosixPath(base).name
        facts = base_from(directory, model_id=base)
        checkpoint = read_checkpoint(directory)
        identity = BaseIdentity.of(name, directory, with_weights=path.is_dir())
    except NotFoundError as error:
        raise ServeConfigError(f"base {base!r}: {error}") from error
    except HubUnreachableError as error:
        raise HubUnreachableError(f"base {base!r}: {error}") from error
    except LoradockError as error:
        raise ServeConfigError(f"base {base!r} cannot be served: {error}") from error
    except OSError as error:
        raise ServeConfigError(f"base {base!r} cannot be read: {error}") from error
    behaviour = Behaviour(checkpoint.chat_template, checkpoint.stop_token_ids)
    return ServedBase(name, model, facts, behaviour, identity, directory)


def _fetch_small_files(base: str, revision: str | None) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=SMALL_FILES))
    except HFValidationError:
        raise NotFoundError("neither a directory nor a Hub id (org/name)") from None
    except LocalEntryNotFoundError as error:
        way_in = _way_in(error)
        # What a person has to mend, or has asked for, does not mend itself by trying again.
        kind = NotFoundError if way_in or is_offline_mode() else HubUnreachableError
        raise kind(f"not a directory, and the Hub cannot be reached: {error}{way_in}") from error
    except Exception as error:  # what the HTTP library below raises, of proxies too, has no ancestor that we know
        raise NotFoundError(f"not a directory, and the Hub does not give it: {error}{_way_in(error)}") from error


def _way_in(error: Exception) -> str:
    """What to do about a repository that is there, but not for everybody."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = [error, error.__cause__]
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return "; accept its terms on huggingface.co, and set HF_TOKEN to a token of that account"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "; if it is private, set HF_TOKEN to a token that may read it"
    return ""

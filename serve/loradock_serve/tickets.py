"""What goes into the admission policy and comes out of it: requests, limits, rules, decisions. Data only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from loradock_serve.fair_share import Tenant
from loradock_serve.slots import UNLIMITED, Adapter

if TYPE_CHECKING:
    from loradock_serve.lines import Line

State = Literal["new", "queued", "running", "gone"]


class Ask(NamedTuple):
    """What a request asks of an engine."""

    tenant: str
    adapter: str | None
    """The digest; None for the base."""
    prompt_tokens: float
    """An estimate; the engine's own figure replaces it at the end."""
    seats: int = 1
    """Sequences that it makes: `n` times its prompts."""
    priority: int = 0
    """Lower is earlier."""
    deadline_at: float | None = None
    """The time after which nobody wants the answer."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request on its way through admission. The policy writes it; everybody else reads."""

    ask: Ask
    arrived_at: float
    returns: bool = False
    """It had a turn before, on an engine that went away: limits of the queue do not turn it away again."""
    state: State = "new"
    begun_at: float = 0.0
    seats: int = 0
    charged: float = 0.0
    generation: int = 0
    number: int = 0
    """The order of arrival."""
    tenant: Tenant = field(init=False)
    adapter: Adapter = field(init=False)
    line: "Line | None" = None
    """Where it waits."""


class Rules(Protocol):
    """What an operator decides (`AdmissionConfig`)."""

    @property
    def max_wait_s(self) -> float: ...
    @property
    def max_queue(self) -> int: ...
    @property
    def max_queue_per_tenant(self) -> int: ...
    @property
    def weights(self) -> Mapping[str, float]: ...
    @property
    def gather_s(self) -> float: ...


@dataclass(frozen=True)
class Limits:
    """What one start of an engine can do at once."""

    slots: int = UNLIMITED
    seats: int = UNLIMITED


@dataclass(frozen=True, slots=True)
class Begin:
    """The request may go."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Refuse:
    """The queue has no room for it."""

    ticket: Ticket
    reason: Literal["queue_full", "tenant_queue_full"]
    waiting: int
    """How many wait already: of everybody, or of the tenant."""
    retry_after_s: int
    """In about this time the engine will have answered those that wait now."""


@dataclass(frozen=True, slots=True)
class Expire:
    """Its deadline came while it waited."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class PinHolds:
    """From now on the adapter has a slot of its own."""

    adapter: str


Decision = Begin | Refuse | Expire | PinHolds

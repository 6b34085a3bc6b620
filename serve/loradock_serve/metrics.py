"""What `/metrics` counts. Labels are closed sets or bounded: model names come from outside, and there may be thousands.

Knows nothing of HTTP or engines; whoever does the thing counts it.
"""

from collections import OrderedDict
from collections.abc import Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from loradock_adapters.registry import Version
from loradock_serve.tallies import Count, CounterTally, HistogramTally, Spread

REGISTRY = CollectorRegistry()
CLIENT_GONE = 499
"""What logs and metrics call a request whose client hung up (nginx's number for it)."""
MAX_MODEL_LABELS = 200
"""Names that get a time series of their own; later ones count as "(other)"."""

MAX_VERSION_LABELS = 500
"""Versions that have time series of their own at one moment; the one that was asked least recently makes room."""

REQUESTS = CounterTally(
    "loradock_requests_total", "Requests to the OpenAI routes, by route and status.", ["route", "status"], REGISTRY
)
REQUEST_SECONDS = HistogramTally(
    "loradock_request_seconds",
    "From a request's arrival to the end of its answer.",
    ["route"],
    REGISTRY,
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
)


class _InFlight:
    """Requests that are being answered or held. A plain number: it changes twice with each of them."""

    count = 0


IN_FLIGHT = _InFlight()
Gauge("loradock_requests_in_flight", "Requests that are being answered or held.", registry=REGISTRY).set_function(
    lambda: IN_FLIGHT.count
)
TOKENS = CounterTally("loradock_tokens_total", "Tokens by the engine's own figures.", ["model", "direction"], REGISTRY)
LOAD_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
ADAPTER_LOAD_SECONDS = Histogram(
    "loradock_adapter_load_seconds",
    "How long the engine took to load an adapter.",
    buckets=LOAD_BUCKETS_S,
    registry=REGISTRY,
)
ADAPTER_REQUESTS = CounterTally(
    "loradock_adapter_requests_total",
    "Requests to adapters, by whether the engine had the adapter loaded when they came.",
    ["model", "found"],
    REGISTRY,
)
VERSION_REQUESTS = Counter(
    "loradock_version_requests_total",
    "Requests by the version that they were for, and how they ended: ok, refused (4xx), failed (5xx), gone (the client "
    "hung up).",
    ["model", "version", "outcome"],
    registry=REGISTRY,
)
VERSION_SECONDS = Counter(
    "loradock_version_seconds_total",
    "Seconds from arrival to the end of the answer, of the requests that ended ok, by version.",
    ["model", "version"],
    registry=REGISTRY,
)
ADAPTERS = Gauge(
    "loradock_adapters", "Hot-swapped adapters (current versions), by where they are.", ["residency"], registry=REGISTRY
)
ADAPTER_SLOTS = Gauge(
    "loradock_adapter_slots", "Slots of the base's engine, by what they hold.", ["state"], registry=REGISTRY
)
RESIDENCY_AGE = Gauge(
    "loradock_residency_age_seconds", "How long ago the engine last said where adapters are.", registry=REGISTRY
)
ADAPTER_READS = Counter(
    "loradock_adapter_reads_total", "Times an adapter's weights came into the engine's host memory.", registry=REGISTRY
)
ADAPTER_ACTIVATIONS = Counter(
    "loradock_adapter_activations_total", "Times an adapter was written into a slot.", registry=REGISTRY
)
ADAPTER_EVICTIONS = Counter(
    "loradock_adapter_evictions_total",
    "Times an adapter had to make room for another, by where it was.",
    ["place"],
    registry=REGISTRY,
)
UPLOADED_BYTES = Counter("loradock_uploaded_bytes_total", "Bytes stored from uploads.", registry=REGISTRY)
PUBLISHES = Counter("loradock_publishes_total", "Uploads published or refused.", ["verdict"], registry=REGISTRY)
PROOFS = Counter(
    "loradock_proofs_total",
    "Versions that an engine was to prove: proven, unproven, failed, or refused before they were published.",
    ["outcome"],
    registry=REGISTRY,
)
PROOF_STATES = Gauge(
    "loradock_versions_proof", "Current versions, by what an engine has shown about them.", ["state"], registry=REGISTRY
)
ENGINE_UP = Gauge("loradock_engine_up", "1 while the base's engine is ready.", registry=REGISTRY)
ENGINE_STARTS = Gauge(
    "loradock_engine_starts", "Starts of the base's engine since the gateway's own.", registry=REGISTRY
)

QUEUE_SECONDS = HistogramTally(
    "loradock_queue_seconds",
    "How long requests that were given to an engine waited for their turn in our queue.",
    [],
    REGISTRY,
    buckets=(0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
).labels()
QUEUED = Gauge(
    "loradock_queue_length", "Requests that wait for their turn on an engine.", ["engine"], registry=REGISTRY
)
ADMITTED = Gauge(
    "loradock_queue_admitted", "Requests that have their turn on an engine.", ["engine"], registry=REGISTRY
)
NOT_ADMITTED = Counter(
    "loradock_queue_rejected_total",
    "Requests that did not get their turn: queue_full, tenant_queue_full, queue_bytes_full, deadline, client_gone.",
    ["reason"],
    registry=REGISTRY,
)

# Closed sets stand at 0 from the start: to Prometheus a series that begins with 1 has not grown.
for _counter, _values in (
    (PUBLISHES, ("shared", "dedicated", "rejected")),
    (PROOFS, ("proven", "unproven", "failed", "refused")),
    (NOT_ADMITTED, ("queue_full", "tenant_queue_full", "queue_bytes_full", "deadline", "client_gone")),
):
    for _value in _values:
        _counter.labels(_value)

_labelled: set[str] = set()


def model_label(name: str) -> str:
    """The name itself for the first `MAX_MODEL_LABELS` models that are metered, "(other)" after that."""
    if name not in _labelled:
        if len(_labelled) >= MAX_MODEL_LABELS:
            return "(other)"
        _labelled.add(name)
    return name


def meter(model: str, prompt_tokens: int, completion_tokens: int) -> None:
    """Count the tokens of one answer."""
    prompt, completion = _tokens(model_label(model))
    prompt.inc(prompt_tokens)
    completion.inc(completion_tokens)


def count_request(route: str, status: int, seconds: float) -> None:
    """Count one request to an OpenAI route."""
    requests, histogram = _requests(route, status)
    requests.inc()
    histogram.observe(seconds)


def count_version(version: Version, status: int, seconds: float) -> None:
    """Count one request to a version of a name."""
    name, number = version.name, version.number
    series = _versions.get((name, number))
    if series is None:
        series = _versions[name, number] = _VersionSeries(name, str(number))
        if len(_versions) > MAX_VERSION_LABELS:
            _versions.popitem(last=False)[1].remove()
    else:
        _versions.move_to_end((name, number))
    series.count(_outcome(status), seconds)


class _VersionSeries:
    """The time series of one version, each made when it first counts."""

    def __init__(self, *labels: str) -> None:
        self._labels = labels
        self._requests: dict[str, Counter] = {}
        self._seconds = VERSION_SECONDS.labels(*labels)

    def count(self, outcome: str, seconds: float) -> None:
        counter = self._requests.get(outcome)
        if counter is None:
            counter = self._requests[outcome] = VERSION_REQUESTS.labels(*self._labels, outcome)
        counter.inc()
        if outcome == "ok":
            self._seconds.inc(seconds)

    def remove(self) -> None:
        for outcome in self._requests:
            VERSION_REQUESTS.remove(*self._labels, outcome)
        VERSION_SECONDS.remove(*self._labels)


_versions: OrderedDict[tuple[str, int], _VersionSeries] = OrderedDict()


def _outcome(status: int) -> str:
    if status < 400:
        return "ok"
    if status == CLIENT_GONE:
        return "gone"
    return "refused" if status < 500 else "failed"


def count_adapter_request(name: str, *, hit: bool) -> None:
    """Count one request to an adapter."""
    _adapter_requests(model_label(name), "loaded" if hit else "absent").inc()


def count_engine(before: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Add what an engine counted between two looks at it; `before` is empty at the first look after its start."""
    counters = {
        "reads": ADAPTER_READS,
        "activations": ADAPTER_ACTIVATIONS,
        "slot_evictions": ADAPTER_EVICTIONS.labels("slot"),
        "cpu_evictions": ADAPTER_EVICTIONS.labels("cpu"),
    }
    for name, counter in counters.items():
        counter.inc(max(0, now.get(name, 0) - before.get(name, 0)))


# Looking a time series up by its labels costs more than counting on it. Labels are bounded, and so are these.


@cache
def _tokens(label: str) -> tuple[Count, Count]:
    return TOKENS.labels(label, "prompt"), TOKENS.labels(label, "completion")


@cache
def _requests(route: str, status: int) -> tuple[Count, Spread]:
    return REQUESTS.labels(route, status), REQUEST_SECONDS.labels(route)


@cache
def _adapter_requests(label: str, found: str) -> Count:
    return ADAPTER_REQUESTS.labels(label, found)

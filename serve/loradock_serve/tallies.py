"""Counters and histograms for the hot path: prometheus_client's in everything that is shown, and without the locks and
checks that cost it several microseconds a request.

For one event loop, on which counting and collecting both happen. Made by the library's interface for collectors of
one's own; knows nothing of what is counted.
"""

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

S = TypeVar("S")


class Count:
    """One time series of a counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Count something."""
        self.value += amount


class Spread:
    """One time series of a histogram."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of each bucket by itself; the last is of what is over all bounds."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count something of this size."""
        self.total += value
        self.counts[bisect_left(self._bounds, value)] += 1


class _Tally(Collector, Generic[S]):
    def __init__(self, name: str, documentation: str, label_names: Iterable[str], registry: CollectorRegistry) -> None:
        self.label_names = tuple(label_names)
        self._name = name
        self._documentation = documentation
        self._series: dict[tuple[str, ...], S] = {}
        registry.register(self)

    @abstractmethod
    def _make(self) -> S: ...

    def describe(self) -> Iterable[Metric]:
        """prometheus_client: by this it knows the names that are taken."""
        return [self._family()]

    @abstractmethod
    def _family(self) -> Metric: ...

    def labels(self, *values: object) -> S:
        """The time series of these labels, made when it is first asked for. Worth keeping: looking it up costs more
        than counting."""
        key = tuple(map(str, values))
        if len(key) != len(self.label_names):
            raise ValueError(f"{self._name} has the labels {self.label_names}, got {key}")
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = self._make()
        return series


class CounterTally(_Tally[Count]):
    """A counter; its name ends with `_total`."""

    def _make(self) -> Count:
        return Count()

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily(self._name, self._documentation, labels=self.label_names)

    def collect(self) -> Iterator[Metric]:
        """prometheus_client."""
        family = self._family()
        for labels, count in self._series.items():
            family.add_metric(labels, count.value)
        yield family


class HistogramTally(_Tally[Spread]):
    """A histogram with these bounds, each within its bucket."""

    def __init__(
        self,
        name: str,
        documentation: str,
        label_names: Iterable[str],
        registry: CollectorRegistry,
        *,
        buckets: Sequence[float],
    ) -> None:
        self._bounds = tuple(map(float, buckets))
        super().__init__(name, documentation, label_names, registry)
        if not self.label_names:
            self.labels()  # shown as 0 from the start

    def _make(self) -> Spread:
        return Spread(self._bounds)

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._documentation, labels=self.label_names)

    def collect(self) -> Iterator[Metric]:
        """prometheus_client."""
        family = self._family()
        for labels, spread in self._series.items():
            upto, buckets = 0, list[tuple[str, float]]()
            for bound, count in zip((*self._bounds, float("inf")), spread.counts, strict=True):
                upto += count
                buckets.append((floatToGoString(bound), upto))  # type: ignore[no-untyped-call]
            family.add_metric(labels, buckets, sum_value=spread.total)
        yield family

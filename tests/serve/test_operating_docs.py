"""docs/operating.md and the alerts beside it, held to a running gateway and to the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from loradock_serve import metrics
from loradock_serve.tallies import _Tally
from loradock_testing.checkpoints import write_adapter
from loradock_testing.gateway import Served

ROOT = Path(__file__).parents[2]
OPERATING = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
ALERTS: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "prometheus-alerts.yaml").read_text(encoding="utf-8"))
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
SELECTOR = re.compile(r"(loradock_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')
ANYTHING = {"status"}
"""Labels whose values depend on what happened."""

FOREIGN = (
    *("Address already in use", "cannot open shared object file", "No module named", "Free memory on device"),
    *("is less than desired", "No available memory for the cache blocks"),
    "Insufficient space in",
    "Engine core initialization failed",
)
"""What the operating system and vLLM say."""


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = OPERATING.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[2:]]


def families() -> dict[str, Metric]:
    """What can be counted, by its name in the table."""
    found = {}
    for family in metrics.REGISTRY.collect():
        suffix = "_total" if family.type == "counter" else ""
        found[f"{family.name}{suffix}".removeprefix("loradock_")] = family
    return found


def test_table_of_metrics_has_each_metric_with_its_labels() -> None:
    named: dict[str, set[str]] = {}
    for names, labels, *_ in table("Metrics"):
        for name in re.findall(r"`(\w+)`", names):
            named[name] = set(re.findall(r"`(\w+)`", labels))
    counted = {name: set(collector_labels(family.name)) for name, family in families().items()}
    assert named == counted


def collector_labels(family: str) -> tuple[str, ...]:
    collector: Any = metrics.REGISTRY._names_to_collectors[family]
    labels: tuple[str, ...] = collector.label_names if isinstance(collector, _Tally) else collector._labelnames
    return labels


def test_reasons_verdicts_and_outcomes_are_counted_from_0() -> None:
    """A series that begins with its first event has not grown, says Prometheus; so nobody would be woken by it."""
    rows = {name: text for names, _, text in table("Metrics") for name in re.findall(r"`(\w+)`", names)}
    for name in ("queue_rejected_total", "publishes_total", "proofs_total"):
        (label,) = collector_labels(f"loradock_{name.removesuffix('_total')}")
        values = {s.labels[label] for s in families()[name].samples if s.name.endswith("_total")}
        assert values == set(re.findall(r"`(\w+)`", rows[name])), name


def matching(samples: list[Sample], name: str, matchers: str) -> list[Sample]:
    """The samples that a selector of an alert takes."""
    found = [sample for sample in samples if sample.name == name]
    for label, operator, value in MATCHER.findall(matchers):
        pattern = re.compile(value if operator == "=~" else re.escape(value))
        found = [s for s in found if label in s.labels and (label in ANYTHING or pattern.fullmatch(s.labels[label]))]
    return found


def test_alerts_are_there() -> None:
    assert len(RULES) >= 8
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket") for rule in RULES)


async def test_every_selector_of_an_alert_finds_what_a_gateway_counts(served: Served, tmp_path: Path) -> None:
    await served.until_ready()
    assert (await served.push(write_adapter(tmp_path / "adapter"), "demo")).status_code == 201
    await served.text("demo", "a b")
    text = (await served.client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    for rule in RULES:
        selectors = SELECTOR.findall(rule["expr"])
        assert selectors, rule["alert"]
        for name, matchers in selectors:
            assert matching(samples, name, matchers), f"{rule['alert']}: {name}{{{matchers}}}"


def test_selector_of_nothing_finds_nothing() -> None:
    samples = [Sample("loradock_adapters", {"residency": "cpu"}, 1.0)]
    assert matching(samples, "loradock_adapters", 'residency="cpu"') == samples
    assert matching(samples, "loradock_adapters", 'residency="gpu"') == []
    assert matching(samples, "loradock_adapters", 'place="cpu"') == []


def said() -> Iterator[str]:
    """Every text in the sources; what is filled in stands as a line break, which no message has."""
    for package in ("adapters", "serve", "train"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\n" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def symptoms() -> list[str]:
    """What the table quotes in its first column, cut where something is left out, filled in, or put together."""
    quoted = [text for row in table("Symptom, cause, what to do") for text in re.findall(r"`([^`]+)`", row[0])]
    cut = re.compile(r"…|\d+|[:,;](?: |$)|the base's engine")
    pieces = [piece.strip() for text in quoted for piece in cut.split(text)]
    return [
        piece for piece in pieces if re.search("[ _]", piece) and "{" not in piece and not piece.startswith(FOREIGN)
    ]


@pytest.fixture(scope="module")
def texts() -> str:
    return "\n\n".join(said())


@pytest.mark.parametrize("symptom", sorted(set(symptoms())))
def test_symptom_is_something_that_the_program_says(symptom: str, texts: str) -> None:
    assert symptom in texts


def test_symptoms_are_found_at_all() -> None:
    assert len(symptoms()) > 20

"""The parts of the comparison with stock vLLM that decide what the figures say, and that nothing stays running."""

import collections
import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from against_stock import chart, throughput
from against_stock.bars import judged
from against_stock.checkpoints import SMALL, WIDE, make_adapters
from against_stock.duel import MUST_MATCH, models_of, require_alike
from against_stock.errors import BenchmarkError
from against_stock.figures import OURS, STOCK, Round, agreement, compared, order_of, percentile, table
from against_stock.processes import command_of, descendants, environment_of
from against_stock.workload import shuffled, uneven, zipf
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.safetensors_header import read_header

MIB = 1024**2


# -- figures


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.99, 4.0), (0.75, 3.0), (0.76, 4.0), (0.01, 1.0)])
def test_percentile_is_the_nearest_rank(share: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == expected


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_comparison_takes_medians_of_rounds_and_latencies_of_all_requests() -> None:
    stock = [Round(100.0, (1.0, 3.0)), Round(300.0, (2.0,)), Round(200.0, (9.0,))]
    ours = [Round(400.0, (1.0,)), Round(150.0, (1.0,)), Round(500.0, (1.0,))]
    result = compared({STOCK: stock, OURS: ours})
    assert result["ratio"] == 2.0
    assert result["ratio_by_round"] == [4.0, 0.5, 2.5]
    assert result[STOCK] == {
        "tokens_per_s": 200.0, "slowest_round": 100.0, "fastest_round": 300.0, "p50_s": 2.5, "p99_s": 9.0,
        "longest_s": 9.0,
    }  # fmt: skip


def test_order_of_sides_turns_every_round() -> None:
    assert [order_of(number)[0] for number in range(4)] == [STOCK, OURS, STOCK, OURS]


def test_agreement_is_the_share_of_equal_answers() -> None:
    assert agreement(["a", "b", "c", "d"], ["a", "x", "c", "d"]) == 0.75


def test_table_shows_a_missing_value_as_a_dash() -> None:
    assert table(["k", "tokens/s"], [[1, 2345.6], [None, 0.051]]).splitlines() == [
        "k  tokens/s", "1     2,346", "-     0.051",
    ]  # fmt: skip


# -- workload


def test_shuffled_calls_name_every_model_equally_often() -> None:
    calls = shuffled(["a", "b", "c"], 30, 8, seed=1)
    assert collections.Counter(call.model for call in calls) == {"a": 10, "b": 10, "c": 10}


def test_calls_are_the_same_for_one_seed_and_differ_for_another() -> None:
    assert shuffled(["a", "b"], 20, 8, seed=1) == shuffled(["a", "b"], 20, 8, seed=1)
    prompts = {call.prompt for seed in (1, 2) for call in shuffled(["a", "b"], 20, 8, seed=seed)}
    assert len(prompts) == 40


def test_zipf_asks_for_the_first_model_as_often_as_its_share_says() -> None:
    models = [str(number) for number in range(1000)]
    counts = collections.Counter(call.model for call in zipf(models, 20_000, 8, seed=3))
    harmonic = sum(1 / rank for rank in range(1, 1001))
    assert counts["0"] / 20_000 == pytest.approx(1 / harmonic, rel=0.1)
    assert counts["9"] / 20_000 == pytest.approx(1 / (10 * harmonic), rel=0.25)
    assert len(counts) > 700


def test_no_adapters_means_the_base() -> None:
    assert models_of(["a", "b"], 0) == ["base"]


def test_more_adapters_than_there_are_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="3 adapters are asked for, 2 were made"):
        models_of(["a", "b"], 3)


# -- checkpoints


def test_made_adapter_is_one_that_loradock_reads(tmp_path: Path) -> None:
    made = make_adapters(tmp_path, SMALL, ["one", "two"])
    assert read_checkpoint(made["one"]).problems == ()
    assert (made["one"] / "adapter_model.safetensors").read_bytes() != (
        made["two"] / "adapter_model.safetensors"
    ).read_bytes()
    assert len(read_header(made["one"] / "adapter_model.safetensors")) == 2 * 7 * SMALL.layers


def test_wide_adapter_has_38_mib() -> None:
    assert WIDE.adapter_bytes / MIB == pytest.approx(38.5)


# -- the same setup on both sides


def _effective(**changed: object) -> dict[str, object]:
    return {**dict.fromkeys(MUST_MATCH, 1), "environment": {"OMP_WAIT_POLICY": "PASSIVE"}, **changed}


def test_engines_set_up_alike_are_compared() -> None:
    require_alike({STOCK: _effective(command="a"), OURS: _effective(command="b")})


def test_engines_set_up_differently_are_not_compared() -> None:
    ours = _effective(max_num_seqs=2, environment={"OMP_WAIT_POLICY": "ACTIVE"})
    with pytest.raises(BenchmarkError, match=r"max_num_seqs: stock 1, ours 2; OMP_WAIT_POLICY: stock PASSIVE"):
        require_alike({STOCK: _effective(), OURS: ours})


# -- what runs below a process


def test_descendants_are_found_with_command_and_environment() -> None:
    sleeper = "import time, subprocess, sys; subprocess.run([sys.executable, '-c', 'input()', 'inner'], stdin=0)"
    environment = os.environ | {"LORADOCK_TEST_MARK": "a=b"}
    command = [sys.executable, "-c", sleeper]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            while not any("inner" in command_of(pid) for pid in descendants(process.pid)):
                assert process.poll() is None
            inner = next(pid for pid in descendants(process.pid) if "inner" in command_of(pid))
            assert environment_of(inner)["LORADOCK_TEST_MARK"] == "a=b"
        finally:
            process.communicate(b"\n")
    assert descendants(process.pid) == []


# -- bars and the chart


def _cell(adapters: int, ratio: float, bar: float | None) -> dict[str, Any]:
    side = {"tokens_per_s": 1000.0, "p50_s": 1.0, "p99_s": 2.0, "longest_s": 2.5}
    faster = side | {"tokens_per_s": 1000 * ratio}
    return {"adapters": adapters, "ratio": ratio, "bar": bar, "same_answers": 1.0, STOCK: side, OURS: faster}


def _table() -> dict[str, Any]:
    blocks = [{"slots": 64, "cells": [_cell(0, 0.9, 0.95), _cell(4, 2.1, 2.0), _cell(5, 2.0, None)]}]
    return {"scenario": "table", "shape": "small", "in_flight": 64, "max_tokens": 48, "blocks": blocks}


def test_every_figure_with_a_bar_is_judged() -> None:
    assert judged(_table()) == [
        {"what": "table: 64 slots, no adapters", "measured": 0.9, "bar": ">= 0.95", "held": False},
        {"what": "table: 64 slots, 4 adapters", "measured": 2.1, "bar": ">= 2", "held": True},
    ]


def test_bar_of_what_was_not_measured_does_not_hold() -> None:
    ours = {"flood": {"queue_p99_s": None}, "latency_ratio_p50": 1.2, "latency_ratio_p99": 1.6}
    assert [bar["held"] for bar in judged({"scenario": "flood", OURS: ours})] == [False, True, False]


def test_table_is_shown_and_drawn(tmp_path: Path) -> None:
    lines = throughput.shown(_table()).splitlines()
    assert lines[0] == "small base, 64 slots"
    assert lines[2].split()[:5] == ["none", "0.90", "0.95", "1,000", "900"]
    chart.draw(_table(), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_chart_cuts_off_no_point() -> None:
    slow = _cell(4, 2.0, None)
    slow[STOCK] = slow[STOCK] | {"p99_s": 50.0}
    table = _table()
    table["blocks"].append({"slots": 4, "cells": [_cell(0, 1.0, None), slow]})
    for axes in chart.figure_of(table).axes:
        highest = max(value for line in axes.lines for value in line.get_ydata())
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > highest


def test_uneven_calls_are_half_to_one_and_a_half_times_the_mean() -> None:
    lengths = [call.max_tokens for call in itertools.islice(uneven("a", 48, seed=1, user="t"), 500)]
    assert (min(lengths), max(lengths)) == (24, 72)
    assert statistics.mean(lengths) == pytest.approx(48, rel=0.05)

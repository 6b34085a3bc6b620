"""A data_dir that is served with another base, or a smaller limit, than its versions were published for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.engine_rules import EngineLimits
from loradock_serve.fit import Fit
from loradock_testing.gateway import Served, serving
from loradock_testing.recorded_fleet import LORA, A
from loradock_testing.tiny_checkpoints import write_adapter, write_base, write_full_model

BASE = BaseIdentity("m", "a" * 64, None)
OTHER = BaseIdentity("n", "a" * 64, None)
FIT = Fit(BASE, EngineLimits(64))


def test_version_of_this_base_within_the_limits_stays_what_it_is() -> None:
    for version in (LORA, replace(LORA, base=BASE), replace(A, base=OTHER)):
        assert FIT(version) == version


@pytest.mark.parametrize("placement", ["shared", "dedicated"])
def test_adapter_of_another_base_is_rejected_even_where_it_would_be_merged(placement: Any) -> None:
    fitted = FIT(replace(LORA, placement=placement, base=OTHER))
    assert fitted.placement == "rejected"
    assert fitted.reasons[0].code == "other_base"
    assert "published for the base n (config aaaaaaaaaaaa), this server's is m (config" in fitted.reasons[0].message


def test_lowered_limit_makes_an_adapter_dedicated_with_both_numbers() -> None:
    fitted = FIT(replace(LORA, rank=65, base=BASE))
    assert (fitted.placement, fitted.reasons[0].code) == ("dedicated", "rank_over_limit")
    assert fitted.reasons[0].message == "rank 65 is over the engine's max_lora_rank 64"
    assert Fit(BASE, None)(replace(LORA, rank=65)).placement == "shared", "an attached engine's limits are not known"
    assert Fit(BASE, EngineLimits(64, enable_lora=False))(LORA).reasons[0].code == "engine_without_lora"


async def listed(served: Served) -> dict[str, tuple[str, str]]:
    data = (await served.client.get("/v1/adapters")).json()["data"]
    return {entry["name"]: (entry["placement"], entry["state"]) for entry in data}


async def test_adapter_of_another_base_is_refused_until_it_is_pushed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, full = write_adapter(tmp_path / "a"), write_full_model(tmp_path / "f")
    async with serving(tmp_path, monkeypatch) as served:
        await served.push(adapter, "tuned")
        await served.push(full, "whole")
        assert [record for record in caplog.records if "published for the base" in record.getMessage()] == []
    caplog.clear()
    async with serving(tmp_path, monkeypatch, base=str(write_base(tmp_path / "other-base"))) as served:
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "base" in r.getMessage()]
        assert warning.startswith("data_dir holds 1 adapter version(s) published for the base tiny-base (config ")
        assert "this server's is other-base (config" in warning
        assert await listed(served) == {"tuned": ("rejected", "unfit"), "whole": ("dedicated", "stopped")}
        shown = (await served.client.get("/v1/adapters/tuned")).json()
        assert (shown["state"], shown["reasons"][0]["code"]) == ("unfit", "other_base")
        assert (await served.client.get("/v1/models/tuned")).json()["loradock"]["state"] == "unfit"
        answer = await served.complete("tuned", "x")
        assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
        error = answer.json()["error"]
        assert (error["code"], error["problems"]) == ("unfit", shown["reasons"][:1])
        assert error["message"].startswith("'tuned' version 1 does not fit this server: published for the base tiny-b")
        again = await served.push(adapter, "tuned")
        assert (again.status_code, again.json()["created"]) == (200, False)
        assert (await served.text("tuned", "x")).endswith(":x")
    async with serving(tmp_path, monkeypatch) as served:
        assert (await listed(served))["tuned"] == ("rejected", "unfit")
        assert (await served.client.delete("/v1/models/tuned")).status_code == 200


async def test_lowered_limit_moves_an_adapter_to_an_engine_of_its_own_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, monkeypatch) as served:
        assert (await served.push(write_adapter(tmp_path / "a", rank=16), "wide")).json()["placement"] == "shared"
    async with serving(tmp_path, monkeypatch, engine={"max_lora_rank": 8}) as served:
        assert await listed(served) == {"wide": ("dedicated", "stopped")}
        shown = (await served.client.get("/v1/adapters/wide")).json()
        assert shown["reasons"][0]["message"] == "rank 16 is over the engine's max_lora_rank 8"
        assert [version["placement"] for version in shown["versions"]] == ["dedicated"]
    async with serving(tmp_path, monkeypatch) as served:
        assert (await listed(served))["wide"][0] == "shared"

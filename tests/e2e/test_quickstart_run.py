"""The quickstart's promises and configs: a broken promise must be told, and the three YAMLs must be what they say."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from loradock_serve.config import load_config as load_serve_config
from loradock_train.config_file import load_config

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import results  # noqa: E402
from asking import Question  # noqa: E402

YAMLS = ("base", "packages-lora", "keywords-lora")
QUESTIONS = tuple(
    [Question("packages", f"lines {number}", "email" if number % 2 else "xml") for number in range(100)]
    + [Question("keywords", f"more lines {number}", "if" if number % 2 else "for") for number in range(100)]
)


def all_kept() -> results.Result:
    """Every fine-tune knows its own task perfectly and answers in its own words to the other's questions."""
    after = {}
    for question in QUESTIONS:
        after[results.BASE, question] = "self.x = y"
        for fine_tune in results.FINE_TUNES:
            own = question.task == fine_tune.task
            after[fine_tune.name, question] = (
                question.answer if own else {"packages": "xml", "keywords": "for"}[fine_tune.task]
            )
    before = {(results.BASE, question): "self.x = y" for question in QUESTIONS}
    first_token_s = {"packages": 1.0, "keywords": 1.5, "packages-full": 50.0}
    placement = {"base": "shared", "packages": "shared", "keywords": "shared", "packages-full": "dedicated"}
    equal = {"packages": 0, "packages-full": 0}
    return results.Result(QUESTIONS, before, after, first_token_s, placement, equal, 31.0)


def test_problems_with_all_promises_kept_is_empty() -> None:
    assert results.problems_with(all_kept()) == []


def test_problems_with_a_constant_answer_names_the_score_and_the_model() -> None:
    result = all_kept()
    for question in QUESTIONS:
        result.after["keywords", question] = "for"
    assert results.problems_with(result) == [
        "keywords: 0.50 is less than 0.25 over the best constant answer, 0.50",
    ]


def test_problems_with_a_base_that_knows_already_are_told_before_and_beside() -> None:
    result = all_kept()
    for question in QUESTIONS:
        if question.task == "keywords":
            result.before[results.BASE, question] = result.after[results.BASE, question] = question.answer
    assert results.problems_with(result) == [
        "keywords: 1.00 is less than 0.25 over the base before the push, 1.00",
        "keywords: 1.00 is less than 0.25 over the base beside it, 1.00",
    ]


def test_problems_with_adapters_that_answer_alike_tell_so() -> None:
    result = all_kept()
    for question in QUESTIONS[:30]:
        result.after["keywords", question] = result.after["packages", question]
    assert results.problems_with(result) == ["packages and keywords: only 85% of answers differ, 90% are promised"]


def test_problems_with_a_slow_push_or_a_wrong_placement_are_told() -> None:
    result = all_kept()
    result.first_token_s["packages"] = 3.1
    result.placement["packages-full"] = "shared"
    assert results.problems_with(result) == [
        "packages: first token 3.1 s after its push, 3 s are promised",
        "packages-full: placement is shared, not dedicated",
    ]


def test_problems_with_few_rows_are_told() -> None:
    result = all_kept()
    few = replace(result, questions=QUESTIONS[1:])
    assert "packages: 99 held-out rows, at least 100 are promised" in results.problems_with(few)


def test_results_table_shows_every_model_with_its_scores(tmp_path: Path) -> None:
    paths = results.Paths(tmp_path)
    for name in ("base", *(fine_tune.run for fine_tune in results.FINE_TUNES)):
        paths.checkpoint(name).mkdir(parents=True)
        (paths.checkpoint(name) / "model.safetensors").write_bytes(bytes(1_500_000))
        (paths.run(name) / "run.json").write_text(json.dumps({"train_seconds": 41.6}))
    table = results.results_table(all_kept(), paths)
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    base = ("base", "packages / keywords", "shared", "1.5 MB", "42 s", "0.50 / 0.50", "0.00 / 0.00", "0.00 / 0.00", "")
    assert cells[0] == base
    assert cells[3] == ("packages-full", "packages", "dedicated", "1.5 MB", "42 s", "0.50", "0.00", "1.00", "50.0 s")


def test_paths_clear_leaves_what_the_quickstart_did_not_make(tmp_path: Path) -> None:
    paths = results.Paths(tmp_path)
    paths.checkpoint("base").mkdir(parents=True)
    (tmp_path / "thesis.txt").write_text("mine")
    paths.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", YAMLS)
def test_every_yaml_is_a_valid_config(name: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    overrides = [f"train_path={rows}"] + ([] if name == "base" else ["model_id=org/name"])
    overrides += [f"valid_path={rows}"] if name == "packages-lora" else []
    config, notices = load_config(QUICKSTART / f"{name}.yaml", overrides)
    kinds = {"base": "scratch", "packages-lora": "lora", "keywords-lora": "lora"}
    assert config.kind == kinds[name]
    assert notices == []


def test_serve_yaml_is_a_valid_config_in_the_dtype_of_the_training() -> None:
    config = load_serve_config(QUICKSTART / "serve.yaml", {"base": "org/name"})
    trained = {yaml.safe_load((QUICKSTART / f"{name}.yaml").read_text())["save_dtype"] for name in YAMLS}
    assert trained == {config.engine.dtype}


def test_problems_between_lora_and_full_are_told() -> None:
    result = all_kept()
    for question in QUESTIONS[:30]:
        result.after["packages", question] = f"nothing {question.prompt}"
    worse = replace(result, size_ratio=8.4, disagreements={"packages": 1})
    assert results.problems_with(worse) == [
        "packages: 0.70 is less than 0.25 over the best constant answer, 0.50",
        "packages: 0.70 is more than 0.25 below full training, 1.00",
        "packages-full: its checkpoint is 8.4 times that of LoRA, 20 times are promised",
        "packages: tokens served against those of transformers and PEFT: 1 of 12 differ",
        "packages-full: tokens served against those of transformers and PEFT: nobody compared them",
    ]


def test_second_run_takes_away_what_the_server_kept_read_only(tmp_path: Path) -> None:
    version = results.Paths(tmp_path).server / "versions" / "abc"
    version.mkdir(parents=True)
    (version / "file").write_text("x")
    version.chmod(0o555)
    assert as_a_user(lambda: results.Paths(tmp_path).clear(), owner_of=tmp_path) == 0
    assert not version.exists()


def as_a_user(do: Callable[[], None], owner_of: Path) -> int:
    """The exit status of a forked process that does it: root, who may do anything, becomes nobody first."""
    nobody = 65534
    if os.getuid() == 0:
        for path in [owner_of, *owner_of.rglob("*")]:
            os.chown(path, nobody, nobody)
        for parent in owner_of.parents[:-1]:
            parent.chmod(parent.stat().st_mode | 0o111)
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(nobody)
            do()
        finally:
            os._exit(1 if sys.exc_info()[0] is not None else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

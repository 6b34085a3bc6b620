"""A checkpoint is complete or absent; a proof that fails says why."""

from pathlib import Path

import pytest
import torch

from loradock_train.errors import ProofError
from loradock_train.export import write_atomically
from loradock_train.proof import prove
from loradock_train.report import card_license

PROMPTS = [[1, 2], [3]]


def test_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"

    def fill(folder: Path) -> None:
        (folder / "a").write_text("1")
        assert not target.exists()
        (folder / "a").chmod(0o600)

    write_atomically(target, fill)
    assert (target / "a").read_text() == "1"
    assert (target / "a").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_folder_that_could_not_be_filled_is_absent(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("1")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "checkpoint", fill)
    assert list(tmp_path.iterdir()) == []


def test_proof_holds_what_the_server_can_compare() -> None:
    base, trained = torch.zeros(2, 8), torch.arange(16.0).reshape(2, 8)
    entry = prove(PROMPTS, base, trained, trained.clone(), torch.float32, "lora").passport_entry()
    assert (entry.dtype, entry.computed_in) == ("float32", "float32")
    assert entry.prompts[0].prompt_token_ids == (1, 2)
    assert [best.id for best in entry.prompts[1].top] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert entry.prompts[1].top[0].logit == 15.0
    assert {round(best.logprob, 3) for best in entry.prompts[1].base_top} == {-2.079}, "the base knows nothing"
    assert entry.max_logit_difference == {"reloaded": 0.0, "base": 15.0}


def test_proof_of_a_checkpoint_that_answers_otherwise_fails_with_both_numbers() -> None:
    trained = torch.ones(2, 8)
    with pytest.raises(ProofError, match=r"differs from the trained model by 1 logits \(at most 0\.002 is rounding\)"):
        prove(PROMPTS, torch.zeros(2, 8), trained, trained + 1, torch.float32, "full")


def test_proof_allows_the_rounding_of_bf16() -> None:
    trained = torch.ones(2, 8)
    proof = prove(PROMPTS, torch.zeros(2, 8), trained, trained + 0.01, torch.bfloat16, "full")
    assert proof.reloaded_difference == pytest.approx(0.01, rel=1e-3)


def test_proof_of_an_adapter_that_does_nothing_fails() -> None:
    same = torch.ones(2, 8)
    with pytest.raises(ProofError, match="training changed nothing"):
        prove(PROMPTS, same, same, same, torch.float32, "lora")


def test_proof_of_logits_that_are_no_numbers_fails() -> None:
    with pytest.raises(ProofError, match="NaN or infinite"):
        prove(PROMPTS, torch.ones(2, 8), torch.ones(2, 8), torch.full((2, 8), torch.nan), torch.float32, "lora")


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\n# A model", "mit"),
        ("# No front matter\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("---\nlicense: mit\n", None),
    ],
)
def test_license_is_the_one_that_the_model_cards_front_matter_names(
    tmp_path: Path, card: str, license: str | None
) -> None:
    (tmp_path / "README.md").write_text(card)
    assert card_license(tmp_path) == license
    assert card_license(None) is None

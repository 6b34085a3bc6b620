"""The similarity score: 1 - cosine of the mean last hidden states of a generated answer and of the true one.

    judge = make_judge(config, data, model, tokenizer, "no")
    before = judge.score(model, directory, "before")     # and after training: judge.score(model, directory, "after")

0 is best, 2 is worst. By default the model under test judges itself, which flatters models whose states all point one
way; a fixed embedder judges beside it, so that scores of different runs compare. Answers are embedded alone, without
special tokens; an answer of no tokens is as far as what is unrelated (1). Writes RUN/similarity/. Legend: T tokens of
a text, D hidden size.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from loradock_train.before import RunData
from loradock_train.config import TrainConfig
from loradock_train.config_similarity import SimilarityOptions
from loradock_train.encode import Encoder, stop_token_ids
from loradock_train.errors import DataError, ModelError, Problem
from loradock_train.images import flat
from loradock_train.model import inner_model
from loradock_train.plot_similarity import plot_similarity
from loradock_train.rows import Format, Row, read_rows
from loradock_train.task import as_it_answers, generate
from loradock_train.task_rows import answered, truth_of
from loradock_train.tokenizer import padding_id
from loradock_train.vision import pixels_of

FOLDER = "similarity"
METRIC = "similarity"
COLUMNS = (
    "data_id", "item_name", "image_name", "user_question", "model_generated_answer", "ground_truth_answer",
    "semantic_similarity_score",
)  # fmt: skip
EMBEDDER_COLUMN = "embedder_similarity_score"
LAST_ROW = "average_semantic_similarity_score"


def distance(one: Tensor, other: Tensor) -> float:
    """1 - cosine of two embeddings (D); 1 where one of them is nothing."""
    one, other = one.double(), other.double()
    norms = float(one.norm() * other.norm())
    return 1.0 - float(one @ other) / norms if norms > 0 else 1.0


def embed(model: Any, tokenizer: Any, text: str) -> Tensor:
    """The mean of the last hidden states of a text's tokens: D. `model` gives last_hidden_state (1, T, D)."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    parameter = next(model.parameters())
    if not ids:
        return torch.zeros(1)
    states = model(input_ids=torch.tensor([ids], device=parameter.device)).last_hidden_state[0]  # T, D
    return cast(Tensor, states.float().mean(0).cpu())


@dataclass(frozen=True)
class Asked:
    """One row: what is asked, and what would be right."""

    row: Row
    prompt_ids: list[int]
    truth: str


@dataclass(frozen=True)
class Average:
    """The score of a model: over all rows, three decimals."""

    own: float
    embedder: float | None
    scores: tuple[float, ...]
    """The model's own, one a row."""


@dataclass
class Judge:
    """Scores the answers of a model, before and after it is trained."""

    options: SimilarityOptions
    asked: list[Asked]
    tokenizer: PreTrainedTokenizerBase
    arithmetic: str
    batch_size: int
    image_processor: Any = None
    embedder: tuple[Any, Any] | None = None
    """The fixed model and its tokenizer."""
    done: dict[str, Average] = field(default_factory=dict)

    def check_fits(self, model: nn.Module) -> None:
        """Raises ModelError where an answer could run past the model's last position."""
        positions = getattr(inner_model(model).config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(asked.prompt_ids) for asked in self.asked)
        if isinstance(positions, int) and longest + self.options.max_new_tokens > positions:
            raise ModelError(
                f"similarity.max_new_tokens: {self.options.max_new_tokens} after a prompt of {longest} tokens is over "
                f"the model's max_position_embeddings {positions}; set it to {max(1, positions - longest)} at most"
            )

    def score(self, model: nn.Module, run: Path, when: Literal["before", "after"]) -> Average:
        """Ask everything; writes RUN/similarity/<when>.csv, and after training the plot."""
        with as_it_answers(model, self.arithmetic):
            answers = self._answers(model)
            own = self._distances(_states_of(model), self.tokenizer, answers)
        second = None
        if self.embedder is not None:
            with torch.no_grad():
                second = self._distances(*self.embedder, answers)
        average = Average(_mean(own), None if second is None else _mean(second), tuple(own))
        self.done[when] = average
        folder = run / FOLDER
        folder.mkdir(exist_ok=True)
        write_csv(folder / f"{when}.csv", self.asked, answers, own, second)
        if when == "after":
            plot_similarity({name: each.scores for name, each in self.done.items()}, folder / "similarity.png")
        return average

    def summary(self) -> dict[str, Any]:
        """What run.json says of it: `similarity`, and the run's `score` where no task gives one."""
        after, before = self.done["after"], self.done.get("before")
        detail = {
            "rows": len(self.asked),
            "own": {"before": before.own if before is not None else None, "after": after.own},
            "embedder": {
                "model": self.options.embedder,
                "before": before.embedder if before is not None else None,
                "after": after.embedder,
            },
        }
        score = {"metric": METRIC, "value": after.own, "best": "low", "base": before.own if before else None}
        return {"similarity": detail, "score": score}

    def _answers(self, model: nn.Module) -> list[str]:
        pad, stops = padding_id(self.tokenizer), stop_token_ids(self.tokenizer)
        answers: list[str] = []
        for start in range(0, len(self.asked), self.batch_size):
            batch = self.asked[start : start + self.batch_size]
            pixels = pixels_of(self.image_processor, [asked.row.images for asked in batch])
            prompts = [asked.prompt_ids for asked in batch]
            found = generate(model, prompts, self.options.max_new_tokens, stops, pad, pixels)
            answers += [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in found]
        return answers

    def _distances(self, model: Any, tokenizer: Any, answers: Sequence[str]) -> list[float]:
        pairs = zip(answers, self.asked, strict=True)
        return [
            distance(embed(model, tokenizer, answer), embed(model, tokenizer, asked.truth)) for answer, asked in pairs
        ]


def make_judge(
    config: TrainConfig, data: RunData, model: nn.Module, tokenizer: PreTrainedTokenizerBase, arithmetic: str
) -> Judge | None:
    """The judge of a run, None where the config has no `similarity:`. Raises DataError, ModelError."""
    options = config.similarity
    if options is None:
        return None
    rows = data.splits["valid" if options.path is None else "train"]
    if options.path is not None:
        rows = read_rows(options.path, rows.format, "similarity.path")
    if rows.format == "text":
        raise DataError("similarity needs rows with a true answer:", [Problem(rows.rows[0].where, "raw text has none")])
    step = 1 if options.max_rows is None else max(1.0, len(rows.rows) / options.max_rows)
    chosen = [rows.rows[int(place * step)] for place in range(min(len(rows.rows), options.max_rows or len(rows.rows)))]
    asked = [_asked(row, rows.format, data.encoder) for row in chosen]
    processor = data.processor.image_processor if data.processor is not None else None
    embedder = load_embedder(options.embedder) if options.embedder is not None else None
    judge = Judge(options, asked, tokenizer, arithmetic, config.eval_batch_size_per_device, processor, embedder)
    judge.check_fits(model)
    return judge


def _asked(row: Row, row_format: Format, encoder: Encoder) -> Asked:
    """The question of a row: of a chat, all before the last turn that is learnt."""
    truth = truth_of(row, row_format)
    last = answered(row, row_format, truth)
    return Asked(last, encoder.prompt_ids(last, row_format), truth.strip())


def load_embedder(source: str) -> tuple[Any, Any]:
    """A model without its head, and its tokenizer. Raises ModelError."""
    try:
        model = AutoModel.from_pretrained(source, trust_remote_code=False).eval()
        return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise ModelError(f"similarity.embedder {source}: no model could be loaded: {first}") from error


def _states_of(model: nn.Module) -> Any:
    """What lies below the head of a model, with its adapter."""
    return cast(Any, inner_model(model)).base_model


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3)


# ---- the table ------------------------------------------------------------------------------------------------------


def write_csv(
    path: Path, asked: Sequence[Asked], answers: Sequence[str], own: Sequence[float], second: Sequence[float] | None
) -> None:
    """One line a row, then the averages."""
    columns = [*COLUMNS, *([EMBEDDER_COLUMN] if second is not None else [])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for number, (each, answer) in enumerate(zip(asked, answers, strict=True)):
            values = each.row.values
            known = [
                values.get("data_id", ""),
                values.get("item_name", ""),
                values.get("image_name") or _image(each.row),
            ]
            scores = [f"{own[number]:.6f}", *([f"{second[number]:.6f}"] if second is not None else [])]
            writer.writerow([*known, _question(each.row), answer, each.truth, *scores])
        averages = [f"{_mean(own):.3f}", *([f"{_mean(second):.3f}"] if second is not None else [])]
        writer.writerow([LAST_ROW, *[""] * (len(COLUMNS) - 2), *averages])


def _image(row: Row) -> str:
    return ", ".join(Path(source).name for source in row.images if not source.startswith("data:"))


def _question(row: Row) -> str:
    """What the user said last; of an instruction or completion row, its prompt."""
    values = row.values
    if "messages" not in values:
        return str(values.get("instruction", values.get("prompt")))
    asked: dict[str, Any] = next((turn for turn in reversed(values["messages"]) if turn["role"] == "user"), {})
    return str(flat(asked).get("content", ""))

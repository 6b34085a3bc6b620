"""The churn scenario: clients ask a server for a thousand adapters while others change, pin and remove them.

What is asked comes from `churn_world`, what may be answered is known to `churn_ledger`; the verdict on the tokens is
`churn_truth`'s. Nothing here waits for a clock: those who change things do so once for every so many answers.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loradock_testing.churn_api import Api, ApiError, Reply
from loradock_testing.churn_ledger import Ledger
from loradock_testing.churn_truth import Truth, Verdict
from loradock_testing.churn_world import BASE, FLEETING, MOVING, NAMES, PROMPTS, Request, World, requests

IN_FLIGHT = 48
PUSHES_AT_ONCE = 8
SWITCH_EVERY, PIN_EVERY, REMOVE_EVERY, RETURN_AFTER = 25, 40, 150, 50
"""In answers."""
SWITCHERS = 4
PINS = 2
"""At once; a name that is about to be removed may be a third."""
LONGEST_WAIT_S = 0.3
"""Of a client that hangs up before a whole answer."""


@dataclass(frozen=True)
class Asked:
    """A request and its answer."""

    request: Request
    model: str
    reply: Reply
    began_s: float
    ended_s: float


@dataclass
class Report:
    """What happened in one run."""

    asked: list[Asked] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Requests and changes that were refused, and should not have been."""
    stale: list[str] = field(default_factory=list)
    """Answers by a version that the name did not point at, or not the one that was asked for."""
    happened: Counter[str] = field(default_factory=Counter)
    switch_s: list[float] = field(default_factory=list)
    """How long it took until a new or an old version was a name's."""
    seconds: float = 0.0


class Progress:
    """How many answers there were, for those who wait for more."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._answers = 0
        self._waiting: list[tuple[int, asyncio.Event]] = []

    @property
    def is_over(self) -> bool:
        return self._answers >= self._wanted

    def step(self) -> None:
        """One more."""
        self._answers += 1
        for at, event in self._waiting:
            if self._answers >= at or self.is_over:
                event.set()
        self._waiting = [waiting for waiting in self._waiting if not waiting[1].is_set()]

    async def more(self, answers: int) -> bool:
        """Returns after so many more; False where the run is over."""
        if not self.is_over:
            event = asyncio.Event()
            self._waiting.append((self._answers + answers, event))
            await event.wait()
        return not self.is_over


class Churn:
    """One world on one server, over several runs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ledger = Ledger()

    async def register(self, api: Api) -> None:
        """Publish every name's first checkpoint."""
        names = iter(NAMES)

        async def work() -> None:
            for name in names:
                await self._push(api, name, self.world.checkpoints[name][0])

        await asyncio.gather(*(work() for _ in range(PUSHES_AT_ONCE)))

    async def run(self, api: Api, answers: int, seed: int, *, share_cache: bool) -> Report:
        """So many answers, with all changes going on; `share_cache`: may use each other's prefix blocks."""
        report, progress, stream = Report(), Progress(answers), requests(seed)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(self._client(api, stream, report, progress, f"run-{seed}-" * (not share_cache)))
            for turn in range(SWITCHERS):
                chance = random.Random(f"{seed} {turn}")
                group.create_task(self._switch(api, MOVING[turn::SWITCHERS], report, progress, chance))
            group.create_task(self._pin(api, report, progress, random.Random(seed)))
            group.create_task(self._remove(api, report, progress, random.Random(seed)))
        report.seconds = time.monotonic() - began
        report.stale = [line for asked in report.asked for line in self._complaints(asked)]
        return report

    # -- those who ask -----------------------------------------------------------------------------------------------

    async def _client(self, api: Api, stream: Iterator[Request], report: Report, progress: Progress, salt: str) -> None:
        while not progress.is_over:
            request = next(stream)
            model, path, body = self._call(request, salt)
            began = time.monotonic()
            try:
                if request.hang_up is not None:
                    went = await api.ask_and_go(path, body, request.hang_up * LONGEST_WAIT_S)
                    report.happened["hang-ups"] += went
                    continue
                reply = await api.ask(path, body)
            except ApiError as error:
                if error.is_unknown_model and None in self.ledger.allowed(request.name, began, time.monotonic()):
                    report.happened["unknown"] += 1
                else:
                    report.failures.append(f"{model}: {error}")
                    progress.step()  # a server that fails at everything still comes to an end
                continue
            assert reply is not None
            asked = Asked(request, model, reply, began, time.monotonic())
            report.asked.append(asked)
            progress.step()

    def _call(self, request: Request, salt: str) -> tuple[str, str, dict[str, Any]]:
        """Model, route and body of a request."""
        model = request.name
        if request.old_version is not None and (numbers := self.ledger.numbers(request.name)):
            number = numbers[int(request.old_version * len(numbers))]
            by_digest = request.number % 2
            model += f"@{self.ledger.digest(request.name, number) if by_digest else number}"
        body = {
            "model": model,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": request.stream,
        }
        if salt:
            body["cache_salt"] = f"{salt}{request.number}"
        prompt = PROMPTS[request.prompt]
        if request.chat:
            return model, "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}
        return model, "/v1/completions", body | {"prompt": prompt}

    def _complaints(self, asked: Asked) -> list[str]:
        """What is wrong with an answer whatever its tokens are."""
        request, reply, ledger = asked.request, asked.reply, self.ledger
        found = [] if reply.model == asked.model else [f"{asked.model} was answered as {reply.model}"]
        name, _, wanted = asked.model.partition("@")
        if name == BASE:
            return found + ([] if reply.version is None else [f"the base was answered as version {reply.version}"])
        if wanted.startswith("sha256:"):
            is_right = reply.version is not None and ledger.digest(name, reply.version) == wanted
        elif wanted:
            is_right = reply.version == int(wanted)
        else:
            allowed = ledger.allowed(request.name, asked.began_s, asked.ended_s)
            is_right = reply.version is not None and reply.version in allowed
        if is_right:
            return found
        when = f"between {asked.began_s:.3f} and {asked.ended_s:.3f} s; {ledger.told(name)}"
        return [*found, f"{asked.model} was answered by version {reply.version}, {when}"]

    # -- those who change things -------------------------------------------------------------------------------------

    async def _push(self, api: Api, name: str, directory: Path) -> None:
        with self.ledger.change(name) as change:
            answer = await api.push(name, directory)
            assert answer["placement"] == "shared", answer
            number = change.number = answer["version"]
            self.ledger.published(name, number, directory, answer["digest"])
            if answer["current_version"] != number:  # the bytes of an older version: a push of these moves nothing
                await api.promote(name, number)

    async def _switch(
        self, api: Api, names: Sequence[str], report: Report, progress: Progress, chance: random.Random
    ) -> None:
        """New versions of these names, and back to old ones."""
        while await progress.more(SWITCHERS * SWITCH_EVERY):
            name = chance.choice(names)
            before = self.ledger.current(name)
            assert before is not None
            others = [number for number in self.ledger.numbers(name) if number != before]
            worn = self.ledger.directory(name, before)
            with _noted(report, f"changing {name}"):
                began = time.monotonic()
                if others and chance.random() < 0.5:
                    with self.ledger.change(name) as change:
                        answer = await api.roll_back(name, chance.choice(others))
                        change.number = answer["current_version"]
                else:
                    new = [path for path in self.world.checkpoints[name] if path != worn]
                    await self._push(api, name, chance.choice(new))
                report.switch_s.append(time.monotonic() - began)
                report.happened["switches"] += self.ledger.current(name) != before

    async def _pin(self, api: Api, report: Report, progress: Progress, chance: random.Random) -> None:
        """Hot and cold names into slots and out again."""
        able = [name for name in NAMES[:200] if name not in FLEETING]
        pinned: deque[str] = deque()
        while await progress.more(PIN_EVERY):
            name = chance.choice([name for name in able if name not in pinned])
            with _noted(report, f"pinning {name}"):
                if len(pinned) == PINS:
                    await api.unpin(pinned.popleft())
                await api.pin(name)
                pinned.append(name)
                report.happened["pins"] += 1
        for name in pinned:
            with _noted(report, f"unpinning {name}"):
                await api.unpin(name)

    async def _remove(self, api: Api, report: Report, progress: Progress, chance: random.Random) -> None:
        """Names away, every other one while it is pinned, and back with other weights."""
        while await progress.more(REMOVE_EVERY - RETURN_AFTER):
            name = chance.choice(FLEETING)
            with _noted(report, f"removing {name}"):
                if report.happened["removals"] % 2:
                    await api.pin(name)
                with self.ledger.change(name):
                    await api.remove(name)
                report.happened["removals"] += 1
            await progress.more(RETURN_AFTER)
            with _noted(report, f"bringing back {name}"):
                await self._push(api, name, chance.choice(self.world.checkpoints[name]))


@contextlib.contextmanager
def _noted(report: Report, what: str) -> Iterator[None]:
    """A change that the server refuses is a failure of the run, and no end to it."""
    try:
        yield
    except ApiError as error:
        report.failures.append(f"{what}: {error}")


def judge(
    churn: Churn, tokenizer: PreTrainedTokenizerBase, truth: Truth, asked: Sequence[Asked]
) -> list[tuple[Asked, Verdict]]:
    """A verdict on every answer, by the version that the answer says it came from."""
    plain = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in PROMPTS
    ]
    by_weights: dict[Path | None, list[Asked]] = defaultdict(list)
    for one in asked:
        by_weights[weights_of(churn, one)].append(one)
    judged: list[tuple[Asked, Verdict]] = []
    for directory, group in by_weights.items():
        prompts: list[Any] = [(chats if one.request.chat else plain)[one.request.prompt] for one in group]
        judged += zip(group, truth.judge(directory, prompts, [one.reply.tokens for one in group]), strict=True)
    return judged


def weights_of(churn: Churn, asked: Asked) -> Path | None:
    """The checkpoint that an answer says it came from; None: the base's own."""
    number = asked.reply.version
    return None if number is None else churn.ledger.directory(asked.request.name, number)

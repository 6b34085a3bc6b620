"""The gate's look at the passport: is this base, with this tokenizer, what the checkpoint was trained with?

Every difference is explained. Refused is what makes other answers than the training's, or none that end: other base
weights, ids that stand for other texts, special tokens that are not where they were (`force` publishes these all the
same). Remarked on is what may be right: a tokenizer's file that differs only in form, a template that was changed after
the training. Says nothing where the passport, or the base, does not say. What the two calculate is compared by the
engine (proof.py of the server).
"""

import hashlib
from collections.abc import Mapping

from loradock_adapters.base import BaseModel
from loradock_adapters.checkpoint import Checkpoint
from loradock_adapters.findings import Findings
from loradock_adapters.passport import Passport
from loradock_adapters.vocabulary import TOKENIZER_JSON, Vocabulary, read_vocabulary

_SHOWN = 5


def judge_passport(checkpoint: Checkpoint, base: BaseModel | None, findings: Findings, *, force: bool = False) -> None:
    """Adds everything there is to say about a passport; nothing where there is none. After all other checks: whether
    the checkpoint gets an engine of its own decides whose tokenizer it is served with."""
    passport = checkpoint.passport
    if passport is None:
        return
    if checkpoint.kind == "lora" and base is not None:
        _judge_weights(passport, base, findings, force=force)
        _judge_ids(checkpoint, passport, base.vocab_size, findings)
    has_engine = checkpoint.kind == "full" or bool(findings.detours)
    own = has_engine and TOKENIZER_JSON in checkpoint.file_names
    directory = checkpoint.directory if own else base.directory if base is not None else None
    says = passport.vocabulary_sha256 is not None or passport.special_tokens
    vocabulary = read_vocabulary(directory) if says and directory is not None else None
    if vocabulary is not None:
        _judge_vocabulary(passport, vocabulary, findings, force=force)
    _judge_template(checkpoint, passport, findings)


def _judge_weights(passport: Passport, base: BaseModel, findings: Findings, *, force: bool) -> None:
    trained, served = passport.base.weights_sha256, base.weights_sha256
    model_id = ascii(passport.base.model_id)[1:-1][:120]
    if trained is None or served is None:  # of a Hub id nobody has hashed them: the engine's proof compares it
        return
    if trained != served:
        say = findings.remark if force else findings.refuse
        say(
            "base_weights_differ",
            f"trained on {model_id} with weights {trained[:12]}, the served base has {served[:12]}: an adapter is a "
            "difference from the weights that it was trained on, and from others it leads somewhere else",
            "loradock.json: base.weights_sha256",
            f"serve the base that it was trained on ({model_id}), or train it anew on this one; where the weights are "
            "the same in another form (sharded anew, another dtype), push with --force",
        )


def _judge_ids(checkpoint: Checkpoint, passport: Passport, vocab_size: int | None, findings: Findings) -> None:
    if vocab_size is None:
        return
    outside = [token for token in checkpoint.stop_token_ids if token >= vocab_size]
    message = f"the base knows {vocab_size} tokens, and this id is none of them"
    findings.refuse_all("stop_token_outside", message, [f"loradock.json: stop_token_ids: {t}" for t in outside])
    if passport.probe is not None and passport.probe.largest_id >= vocab_size:
        findings.refuse("stop_token_outside", message, f"loradock.json: probe: {passport.probe.largest_id}")


def _judge_vocabulary(passport: Passport, vocabulary: Vocabulary, findings: Findings, *, force: bool) -> None:
    trained = passport.vocabulary_sha256
    if trained is not None and trained != vocabulary.sha256:
        say = findings.remark if force else findings.refuse
        say(
            "vocabulary_differs",
            f"trained with a vocabulary {trained[:12]}, the served tokenizer's is {vocabulary.sha256[:12]} "
            f"({vocabulary.size} tokens): the same text becomes other ids, and the answers mean other texts",
            "loradock.json: vocabulary_sha256",
        )
    elif trained is not None and passport.tokenizer_sha256 not in (None, vocabulary.file_sha256):
        findings.remark(
            "tokenizer_differs",
            f"tokenizer.json was {str(passport.tokenizer_sha256)[:12]} at the training and is "
            f"{vocabulary.file_sha256[:12]} here; every token has the same id in both",
            "loradock.json: tokenizer_sha256",
        )
    moved = _moved(passport.special_tokens, vocabulary.special_tokens)
    if moved:
        say_all = findings.remark_all if force else findings.refuse_all
        message = "a special token of the training is another id here, or an ordinary text: it ends or begins no turn"
        say_all("special_tokens_differ", message, moved)


def _moved(trained: Mapping[str, int], served: Mapping[str, int]) -> list[str]:
    """The special tokens that are not where they were, the first few."""
    moved = [(text, token) for text, token in sorted(trained.items()) if served.get(text) != token]
    return [
        f"{ascii(text)[1:-1][:60]}: {token} at the training, {served.get(text, 'no special token')} here"
        for text, token in moved[:_SHOWN]
    ]


def _judge_template(checkpoint: Checkpoint, passport: Passport, findings: Findings) -> None:
    """`checkpoint.chat_template` is the one that will be applied, wherever it came from."""
    trained = passport.chat_template_sha256
    if trained is None or checkpoint.chat_template is None:
        return
    applied = hashlib.sha256(checkpoint.chat_template.encode()).hexdigest()
    if trained != applied:
        findings.remark(
            "chat_template_differs",
            f"trained with a chat template {trained[:12]}, chats will be rendered with {applied[:12]}",
            "loradock.json: chat_template_sha256",
        )

"""A plan made, held against the device, and told: `loradock train CONFIG --plan`, and the lines of a run about it.

plan = plan_of_config("lora.yaml")
print(plan.peak_bytes, plan.seconds)
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from loradock_adapters.errors import UsageError
from loradock_train.before import RunData, load_data, open_rows, prepare_model
from loradock_train.calibrate import calibrate
from loradock_train.config import TrainConfig
from loradock_train.config_file import load_config
from loradock_train.cost import clock
from loradock_train.errors import ModelError
from loradock_train.model import base_config, check_base
from loradock_train.peak import PeakMeter
from loradock_train.plan import Plan, of_sweep
from loradock_train.plan_facts import plan_run
from loradock_train.processes import world_size
from loradock_train.remote import local_base
from loradock_train.shared import Alone, Shared
from loradock_train.starting import check_start
from loradock_train.sweep import legs_of
from loradock_train.tokenizer import make_tokenizer
from loradock_train.vision import make_processor

_MB = 1e6


def plan_of_config(path: str | Path, overrides: Sequence[str] = (), nodes: int = 1) -> Plan:
    """By arithmetic, and where that fits the device by three real steps; these not for several processes. Of a sweep:
    of each adapter, and of all one after the other. Raises what the run would raise. nodes: machines, each with the
    config's num_devices."""
    config, _ = local_base(load_config(path, overrides)[0])
    set_seed(config.seed)
    processes = config.num_devices * nodes
    if not can_plan(config):
        raise UsageError(f"--plan cannot count this config: {'; '.join(_beyond(config))}")
    check_start(config, processes)
    architecture = None if config.model_id is None else base_config(config)
    rows, stream = open_rows(config)
    tokenizer = make_tokenizer(config, rows)
    if architecture is not None:
        check_base(architecture, len(tokenizer), config.context_length)
    if make_processor(config, architecture, rows, tokenizer) is not None:
        raise UsageError(
            "--plan cannot count this config: its base sees images, and how many tokens those are stands in the rows"
        )
    data = load_data(config, rows, tokenizer, stream=stream)
    legs = legs_of(config) if config.sweep else {"": config}
    plans = {name: plan_run(leg, tokenizer, data, processes) for name, leg in legs.items()}
    meter = PeakMeter.start()
    shared = Shared() if config.sweep else Alone()

    def tried(leg: TrainConfig, plan: Plan) -> Plan:
        precision, model, _ = prepare_model(leg, architecture, tokenizer, data, shared)
        try:
            return replace(plan, measured=calibrate(leg, model, tokenizer, data, precision, meter))
        except torch.OutOfMemoryError:
            # What was asked for was more than there is: the arithmetic was too hopeful here.
            return replace(plan, available_bytes=min(plan.available_bytes or 0, (plan.peak_bytes or 1) - 1))

    if processes == 1 and all(plan.fits is not False for plan in plans.values()):
        plans = {name: tried(legs[name], plan) for name, plan in plans.items()}
    return of_sweep(plans) if config.sweep else plans[""]


def _beyond(config: TrainConfig) -> list[str]:
    """What the counts do not hold for, and why."""
    given = {
        "preference: TRL keeps the logits of both answers, of the model and of the reference, in its own way": (
            config.preference is not None
        ),
        "fsdp: what each process holds at a moment follows from torch's gathering of the parts": config.is_sharded,
    }
    return [why for why, is_given in given.items() if is_given]


def can_plan(config: TrainConfig) -> bool:
    """Whether the arithmetic holds for this kind of run."""
    return not _beyond(config)


def plan_for_run(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, data: RunData) -> Plan | None:
    """By arithmetic alone, for a run that begins now; None where the run itself will say what is wrong."""
    if not can_plan(config) or data.processor is not None:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            return plan_run(config, tokenizer, data, world_size())
    except ModelError:
        return None


def warnings_of(plan: Plan | None) -> list[str]:
    """What must be heard before the run begins."""
    if plan is None or plan.fits is not False:
        return []
    assert plan.peak_bytes is not None
    assert plan.available_bytes is not None
    told = [
        f"plan: about {_size(plan.peak_bytes)} are needed at the peak, {plan.device} has {_size(plan.available_bytes)} "
        "free: it will probably not fit"
    ]
    told += [f"    {remedy.change}: about {_size(remedy.peak_bytes)}" for remedy in plan.remedies()]
    if len(told) == 1:
        told.append(
            "    neither smaller batches nor an adapter would do: take a smaller base, or a shorter context_length"
        )
    return told


def plan_lines(plan: Plan) -> Iterator[str]:
    """For people."""
    if plan.facts is not None and plan.memory is not None:
        parts = {
            "weights": plan.memory.weights,
            "gradients": plan.memory.gradients,
            "optimiser": plan.memory.optimiser,
            "activations": plan.memory.activations,
            "logits": plan.memory.logits,
            **({"exchange of gradients": plan.memory.exchange} if plan.memory.exchange else {}),
            "peak of training": plan.memory.training_peak,
        }
        if plan.memory.evaluation_peak:
            parts["peak of the first validation"] = plan.memory.evaluation_peak
        each = f" in each of {plan.facts.processes} processes" if plan.facts.processes > 1 else ""
        yield f"memory of batches of {plan.facts.rows} x {plan.facts.tokens} tokens{each}, by arithmetic:"
        for name, amount in parts.items():
            yield f"  {name:<28} {_size(amount):>12}"
        for name, leg in plan.legs.items():
            yield f"  {'peak of ' + name:<28} {_size(leg.peak_bytes or 0):>12}   {_time_told(leg)}"
    else:
        yield "memory: the activations of this architecture cannot be counted beforehand"
    if plan.measured is not None:
        yield f"  {'peak of three real steps':<28} {_size(plan.measured.peak_bytes):>12}"
    if plan.available_bytes is not None:
        fits = {True: "it fits", False: "it does NOT fit", None: ""}[plan.fits]
        yield f"  {'free on ' + plan.device:<28} {_size(plan.available_bytes):>12}   {fits}".rstrip()
    yield f"time: {_time_told(plan)}"
    if plan.price is not None:
        yield f"cost: {plan.price:.4g} at {plan.price_per_hour:g} an hour"
    yield f"disk: {_size(plan.disk_bytes)} (a save takes {_size(plan.save_bytes)})"
    yield from warnings_of(plan)


def _time_told(plan: Plan) -> str:
    if plan.seconds is not None:
        return f"about {clock(plan.seconds)}" + (f" for {plan.steps:,} steps" if plan.steps is not None else "")
    if plan.measured is not None:
        step_s = plan.measured.step_seconds
        return f"about {step_s:.3g} s a step; how many a stream has is not known before it was read (max_steps)"
    if plan.facts is not None and plan.facts.processes > 1:
        why = "not known: steps of several processes are not tried beforehand"
        return why + (f" ({plan.steps:,} of them)" if plan.steps is not None else "")
    return "not known before a step is timed" + (f" for {plan.steps:,} steps" if plan.steps is not None else "")


def compared(plan: Plan, measured_bytes: int) -> str:
    """The plan beside what came."""
    if plan.peak_bytes is None:
        return f"peak memory {_size(measured_bytes)} above the start (not planned)"
    share = measured_bytes / plan.peak_bytes
    return f"peak memory {_size(measured_bytes)} above the start, planned {_size(plan.peak_bytes)} ({share:.2f} of it)"


def _size(amount: int) -> str:
    return f"{amount / _MB:,.1f} MB"

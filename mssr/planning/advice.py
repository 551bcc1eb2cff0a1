"""What to change where a run does not fit: the cheapest changes first, each tried on the same prediction."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mssr.config import Config, LoraConfig
from mssr.planning.memory import Memory

OFFLOADING = "configs/deepspeed/zero3_offload.json"  # suggested where it is, from the folder that `mssr` is started in

Settings = dict[str, dict]  # section -> key -> value


@dataclass(frozen=True)
class Advice:
    """changes: key=value in the order of their cost. peak: bytes with all of them. fits: whether that is enough."""

    changes: tuple[str, ...]
    peak: int
    fits: bool


def advise(config: Config, predict: Callable[[Config], Memory], limit: int, ranks: int) -> Advice | None:
    """The changes that make it fit, the costly ones only if the cheap ones do not do; None where nothing helps.

    limit: bytes of the device.
    """
    taken: list[tuple[str, Settings]] = []
    peak = predict(config).peak
    for name, change in _changes(config, ranks):
        found = predict(_changed(config, [*taken, (name, change)])).peak
        if found > 0.99 * peak:
            continue
        taken = [each for each in taken if each[0].split("=")[0] != name.split("=")[0]] + [(name, change)]
        peak = found
        if peak <= limit:
            taken = _without_idle(taken, lambda left: predict(_changed(config, left)).peak <= limit)
            peak = predict(_changed(config, taken)).peak
            break
    changes = dict.fromkeys(change for name, _ in taken for change in name.split())
    return Advice(tuple(changes), peak, peak <= limit) if taken else None


def _without_idle(
    taken: list[tuple[str, Settings]], fits: Callable[[list[tuple[str, Settings]]], bool]
) -> list[tuple[str, Settings]]:
    """Without those that a later, larger change made needless; the costliest is tried first."""
    for change in reversed(taken):
        left = [each for each in taken if each is not change]
        if left and fits(left):
            taken = left
    return taken


def _changes(config: Config, ranks: int) -> Iterator[tuple[str, Settings]]:
    """(key=value ..., the same as sections) of what this run has not done yet, by its cost in speed or in what is trained."""
    model, train = config.model, config.train
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", {"model": {"gradient_checkpointing": True}}
    if train.deepspeed is None and ranks > 1:
        for stage in range(train.zero_stage + 1, 4):
            yield f"train.zero_stage={stage}", {"train": {"zero_stage": stage}}
    halves = itertools.takewhile(lambda tokens: tokens >= 2048, (train.micro_batch_tokens >> n for n in range(1, 8)))
    for tokens in halves:
        yield f"train.micro_batch_tokens={tokens}", {"train": {"micro_batch_tokens": tokens}}
    if not config.rollout.offload_optimizer and train.zero_stage and train.deepspeed is None:
        yield "rollout.offload_optimizer=true", {"rollout": {"offload_optimizer": True}}
    for share in (0.4, 0.3):
        if config.rollout.gpu_memory > share and config.rollout.engine != "servers":
            yield f"rollout.gpu_memory={share}", {"rollout": {"gpu_memory": share}}
    if config.loads_reference and model.reference == "copy":
        if ranks > 1:
            yield "model.reference=sharded", {"model": {"reference": "sharded"}}
        yield "model.reference=cpu", {"model": {"reference": "cpu"}}
    if train.deepspeed is None and Path(OFFLOADING).is_file():
        offloading = {"train": {"deepspeed": OFFLOADING, "zero_stage": 3}, "rollout": {"offload_optimizer": False}}
        yield f"train.zero_stage=3 train.deepspeed={OFFLOADING} rollout.offload_optimizer=false", offloading
    if model.lora is None:
        adapters = {"gradient_checkpointing": True, "lora": LoraConfig()}
        # In 16 bits the merged adapters need the correction, or the configuration is refused.
        change = {"model": adapters, "algorithm": {"old_logp": "recompute"}}
        yield "model.lora.rank=64 model.gradient_checkpointing=true algorithm.old_logp=recompute", change


def _changed(config: Config, changes: list[tuple[str, Settings]]) -> Config:
    """The configuration with all of them, the later ones over the earlier."""
    sections: Settings = {}
    for _, change in changes:
        for section, values in change.items():
            sections.setdefault(section, {}).update(values)
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=values) for section, values in sections.items()}
    )

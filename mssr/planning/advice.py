"""What to change if a run does not fit: the cheapest changes first, each tried on the same prediction."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mssr.config import Config
from mssr.config.deepspeed_json import offloads_optimizer
from mssr.config.load import apply_override
from mssr.planning.memory import Memory

# Suggested where they exist, from the folder that `mssr` is started in.
SHIPPED = "configs/deepspeed"
OFFLOADING = f"{SHIPPED}/zero3_offload.json"


@dataclass(frozen=True)
class Advice:
    """changes: key=value, in the order of their cost. peak: bytes with all of them. fits: whether that is enough."""

    changes: tuple[str, ...]
    peak: int
    fits: bool


def advise(config: Config, predict: Callable[[Config], Memory], limit: int, ranks: int) -> Advice | None:
    """Return the changes that make the run fit, costly ones only if cheap ones are not enough; None if nothing helps.

    limit: bytes of the device.
    """
    taken: list[str] = []
    peak = predict(config).peak
    for change in _changes(config, ranks):
        found = predict(_changed(config, [*taken, change])).peak
        if found > 0.99 * peak:
            continue
        taken = [each for each in taken if each.split("=")[0] != change.split("=")[0]] + [change]
        peak = found
        if peak <= limit:
            taken = _without_needless(taken, lambda left: predict(_changed(config, left)).peak <= limit)
            peak = predict(_changed(config, taken)).peak
            break
    changes = dict.fromkeys(override for change in taken for override in change.split())
    return Advice(tuple(changes), peak, peak <= limit) if taken else None


def _without_needless(taken: list[str], fits: Callable[[list[str]], bool]) -> list[str]:
    """Drop changes that a later, larger change made needless, the costliest first."""
    for change in reversed(taken):
        left = [each for each in taken if each is not change]
        if left and fits(left):
            taken = left
    return taken


def _changes(config: Config, ranks: int) -> Iterator[str]:
    """Yield "key=value ..." that this run does not use yet, ordered by the cost in speed or in what is trained."""
    model, train = config.model, config.train
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true"
    if ranks > 1:
        for stage in range(train.zero_stage + 1, 4):
            yield f"train.zero_stage={stage}" + _other_json(train.deepspeed, stage)
    halves = itertools.takewhile(lambda tokens: tokens >= 2048, (train.micro_batch_tokens >> n for n in range(1, 8)))
    for tokens in halves:
        yield f"train.micro_batch_tokens={tokens}"
    offloads = train.deepspeed is not None and offloads_optimizer(train.deepspeed)
    if not config.rollout.offload_optimizer and train.zero_stage and not offloads:
        yield "rollout.offload_optimizer=true"
    for share in (0.4, 0.3):
        if config.rollout.gpu_memory > share and config.rollout.engine != "servers":
            yield f"rollout.gpu_memory={share}"
    if config.loads_reference and model.reference == "copy":
        if ranks > 1:
            yield "model.reference=sharded"
        yield "model.reference=cpu"
    if train.deepspeed != OFFLOADING and Path(OFFLOADING).is_file():
        yield f"train.zero_stage=3 train.deepspeed={OFFLOADING} rollout.offload_optimizer=false"
    if model.lora is None:
        # Merged adapters in 16 bits need the correction, or the configuration is refused.
        cap = " algorithm.tis_cap=2.0" if config.algorithm.tis_cap is None else ""
        yield f"model.lora.rank=64 model.gradient_checkpointing=true algorithm.old_logp=recompute{cap}"


def _other_json(current: str | None, stage: int) -> str:
    """Return what else to change for another stage where a DeepSpeed JSON is set, whose stage would replace it."""
    if current is None:
        return ""
    shipped = f"{SHIPPED}/zero{stage}.json"
    return f" train.deepspeed={shipped if Path(shipped).is_file() else 'null'}"


def _changed(config: Config, changes: list[str]) -> Config:
    """Return the configuration with all changes, the later ones over the earlier."""
    values = config.model_dump()
    for override in " ".join(changes).split():
        apply_override(values, override)
    return Config.model_validate(values)

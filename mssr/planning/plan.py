"""`mssr plan`: the prediction of a run's memory and step time."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from mssr.config import Config
from mssr.config.conflicts import refuse_conflicts
from mssr.config.resolve import planned_engine
from mssr.errors import UserError
from mssr.observe.gpu import GPUS, Gpu
from mssr.planning.advice import Advice, advise
from mssr.planning.memory import Machine, Memory, MemoryPlanner
from mssr.planning.step_time import NOTES, StepTime, step_time
from mssr.planning.workload import Workload, with_own_pixel_limits
from mssr.policy.architectures import model_config
from mssr.policy.families import require_family, require_original_weights


@dataclass(frozen=True)
class RunPlan:
    """mean: the lengths that the step time is for. time: None if the run does not fit. advice: None if it fits, or if
    nothing helps."""

    model: str
    machine: Machine
    mean: Workload
    memory: Memory
    time: StepTime | None
    advice: Advice | None
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.machine.memory

    @property
    def exit_code(self) -> int:
        return int(not self.fits)


def plan_run(config: Config, gpu: str, gpus: int, context: str | None = None) -> RunPlan:
    """Predict a run without loading it: the architecture comes from config.json, and its layers run on the meta device.

    gpu: a key of GPUS. gpus: ranks, one per GPU. context: mean lengths, see `Workload.parse`; None: half of the limits.

    Raises:
        UserError: unknown GPU, invalid lengths, settings that such GPUs would refuse, or a model that is not supported or
            whose config.json cannot be read.
    """
    machine = Machine(gpus, _gpu(gpu))
    model = model_config(config.model.path)
    require_family(config.model.path, model.model_type)
    require_original_weights(config.model.path, model.to_dict())
    _refuse_conflicts(config, machine)
    config = with_own_pixel_limits(config, model)
    longest = Workload.longest(config, model)
    mean = Workload.parse(context, config, model) if context else longest.half()
    planner = MemoryPlanner(model, machine)

    def predict(config: Config) -> Memory:
        return planner.predict(config, longest.micro_batch(config.train.micro_batch_tokens, model))

    memory = predict(config)
    fits = memory.peak <= machine.memory
    return RunPlan(
        model=config.model.path,
        machine=machine,
        mean=mean,
        memory=memory,
        time=step_time(config, model, mean, memory, machine) if fits else None,
        advice=None if fits else advise(config, predict, machine.memory, gpus),
        assumptions=(*_assumptions(config, longest, model), *(NOTES if fits else ())),
    )


def _gpu(key: str) -> Gpu:
    for gpu in GPUS:
        if gpu.key == key.lower():
            return gpu
    raise UserError(f"--gpu {key}: unknown; choose from {', '.join(gpu.key for gpu in GPUS)}")


def _refuse_conflicts(config: Config, machine: Machine) -> None:
    """Refuse settings that the planned machine would: `load_config` checked them for this one."""
    try:
        refuse_conflicts(config, machine.device)
    except ValueError as conflict:
        raise UserError(f"on {machine.gpu.key}: {conflict}") from None


def _assumptions(config: Config, longest: Workload, model: PretrainedConfig) -> list[str]:
    shape = longest.micro_batch(config.train.micro_batch_tokens, model)
    notes = [
        f"memory: micro-batches of {len(shape.lengths)} sequences, {shape.tokens} tokens, at the limits: prompts of "
        f"{longest.prompt} tokens ({longest.image} of an image), responses of {longest.response}",
        "host memory: without rows of data.train and data.val, in a temporary file per machine (in memory if TMPDIR is)",
        "1.5 GiB per GPU for the CUDA context and libraries; fragmentation of PyTorch's allocator is not included",
    ]
    if config.model.attention != "flash":
        notes.append("attention by SDPA; flash-attn (model.attention=flash) needs less memory if lengths differ")
    if config.model.liger != "off":
        notes.append("transformers' own layers; liger-kernel's keep fewer activations")
    if planned_engine(config.rollout.engine) == "vllm":
        notes.append("vLLM uses rollout.gpu_memory of the GPU while it generates, and none while it sleeps")
    return notes

"""`mssr plan`: puts the prediction of a run together."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from mssr.config import Config
from mssr.errors import UserError
from mssr.observe.gpu import GPUS, Gpu
from mssr.planning.advice import Advice, advise
from mssr.planning.memory import Machine, Memory, MemoryPlanner
from mssr.planning.step_time import StepTime, step_time
from mssr.planning.workload import Workload
from mssr.policy.architectures import model_config
from mssr.stopwatch import GIB


@dataclass(frozen=True)
class RunPlan:
    """longest: what the memory is predicted for. mean: what the time is. advice: None where it fits, or nothing helps."""

    model: str
    gpu: Gpu
    machine: Machine
    longest: Workload
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
        return 0 if self.fits else 1


def plan_run(config: Config, gpu: str, gpus: int, context: str | None = None) -> RunPlan:
    """Nothing is loaded: the architecture comes from config.json, and its layers run without memory.

    gpu: a key of GPUS. gpus: ranks, one each. context: mean lengths, see `Workload.parse`; None: half of the limits.

    Raises:
        UserError: no such GPU, lengths that are none, or a model whose config.json cannot be read.
    """
    device = _gpu(gpu)
    model = model_config(config.model.path)
    machine = Machine("cuda", gpus, int(device.memory_gib * GIB))
    longest = Workload.longest(config, model)
    mean = Workload.parse(context, config, model) if context else _half(longest)
    shape = longest.micro_batch(config.train.micro_batch_tokens, model)
    planner = MemoryPlanner(model, machine)

    def predict(changed: Config) -> Memory:
        own = longest.micro_batch(changed.train.micro_batch_tokens, model)
        return planner.predict(changed, own)

    memory = planner.predict(config, shape)
    advice = None if memory.peak <= machine.memory else advise(config, predict, machine.memory, gpus)
    return RunPlan(
        model=config.model.path,
        gpu=device,
        machine=machine,
        longest=longest,
        mean=mean,
        memory=memory,
        time=step_time(config, model, mean, memory, machine, device),
        advice=advice,
        assumptions=_assumptions(config, model, longest, len(shape.lengths), shape.tokens),
    )


def _gpu(key: str) -> Gpu:
    for gpu in GPUS:
        if gpu.key == key.lower():
            return gpu
    raise UserError(f"--gpu {key}: not known; these are: {', '.join(gpu.key for gpu in GPUS)}")


def _half(longest: Workload) -> Workload:
    return Workload(max(1, longest.prompt // 2), max(1, longest.response // 2), longest.image // 2)


def _assumptions(
    config: Config, model: PretrainedConfig, longest: Workload, sequences: int, tokens: int
) -> tuple[str, ...]:
    notes = [
        f"memory: micro-batches of {sequences} sequences, {tokens} tokens, at the limits: prompts of {longest.prompt} "
        f"({longest.image} of an image), responses of {longest.response}",
        "1.5 GiB a GPU for the CUDA context and libraries; nothing for what PyTorch's allocator loses between tensors",
    ]
    if config.model.attention != "flash":
        notes.append("attention by SDPA; flash-attn (model.attention=flash) takes less where lengths differ")
    if config.model.liger != "off":
        notes.append("transformers' own layers; liger-kernel's keep less")
    if config.rollout.engine in ("auto", "vllm"):
        notes.append("vLLM takes rollout.gpu_memory of the GPU while it generates, and nothing while it sleeps")
    return tuple(notes)

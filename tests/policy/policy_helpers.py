"""Small real parts for the tests of the policy and the rollouts, each made once: a tiny Qwen2.5-VL, prompts with images
of handwritten digits, batches. The oracle is plain transformers with full logits, one sequence at a time."""

import atexit
import io
import json
import os
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from examples.digits.problems import write_digits
from examples.tiny.model import write_tiny_model
from mssr.batch import Prompt, Sequences, UpdateBatch, pad_rows
from mssr.config import Config, validate_config
from mssr.config.data_keys import DataConfig
from mssr.config.deepspeed_json import with_stage_of_json
from mssr.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from mssr.data.files import open_rows
from mssr.data.prompts import PromptEncoder, load_processors
from mssr.distributed import ALONE, World
from mssr.policy.engine import PolicyEngine
from mssr.policy.weights import named_weights
from mssr.training.checkpoint import Checkpoints

WORKSPACE = "MSSR_TEST_POLICY_WORKSPACE"  # environment variable
PICTURE_SIZES = [[(112, 56)], [(56, 56)], [], [(140, 84)], [(56, 28), (84, 56)], [(28, 84)]]  # per prompt and image
LOWEST = -1e4  # as a logit: p is 0 in float64, and p log p is 0 instead of NaN
DATA = DataConfig(train="unused", min_pixels=784, max_pixels=50_176, instruction="Box it.")


@cache
def workspace() -> Path:
    """Return the folder of models and data, also used by the rank processes that this one starts."""
    if WORKSPACE not in os.environ:
        os.environ[WORKSPACE] = tempfile.mkdtemp(prefix="mssr_policy_")
        atexit.register(shutil.rmtree, os.environ[WORKSPACE], ignore_errors=True)
    return Path(os.environ[WORKSPACE])


@cache
def digits(split: str, count: int) -> Path:
    folder = workspace() / f"{split}_{count}"
    if not folder.exists():
        write_digits(folder, **{"train": 1, "val": 1, "test": 1, split: count})
    return folder / f"{split}.parquet"


@cache
def digit_rows() -> list[dict]:
    rows = open_rows(str(digits("train", 24)))
    return [rows[index] for index in range(len(rows))]


@cache
def model_dir(tied: bool = False) -> str:
    """Return a tiny model with weights large enough that a log-prob depends on the token's position and neighbours."""
    folder = workspace() / f"model_{'tied' if tied else 'untied'}"
    if folder.exists():
        return str(folder)
    corpus = [row["problem"] + row["solution"] for row in digit_rows()]
    write_tiny_model(folder, corpus, hidden=64, layers=2, vocabulary=300, tied=tied)
    model, generator = plain_model(folder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(
                    std=0.12 if "embed_tokens" in name or "lm_head" in name else 0.06, generator=generator
                )
    model.save_pretrained(folder)
    return str(folder)


@cache
def processors() -> tuple:
    return load_processors(model_dir())


@cache
def prompts() -> tuple[Prompt, ...]:
    """Return six prompts: images of different sizes; one prompt has none, one has two."""
    encoder = PromptEncoder(*processors(), DATA)
    made = []
    for number, sizes in enumerate(PICTURE_SIZES):
        row = digit_rows()[number]
        images = [_resized(row["images"][0], size) for size in sizes]
        problem = "Larger: 3 or 8?" if not sizes else row["problem"].removeprefix("<image>")
        made.append(encoder.encode(row | {"images": images, "problem": problem}, number, "digits"))
    return tuple(made)


def _resized(image: dict, size: tuple[int, int]) -> bytes:
    picture = Image.open(io.BytesIO(image["bytes"])).resize(size)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def random_batch(chosen: list[Prompt], lengths: list[int], seed: int = 0) -> UpdateBatch:
    """Return random response tokens (none special) and random values for everything the loss reads."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = len(processors()[0])
    responses = [torch.randint(10, vocabulary, (length,), generator=generator) for length in lengths]
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def logps() -> Tensor:
        return torch.where(mask, -5 + torch.randn(mask.shape, generator=generator), 0.0)

    return UpdateBatch(
        prompts=tuple(chosen),
        tokens=pad_rows(responses, longest),
        mask=mask,
        loss_mask=mask,
        logp=logps(),
        advantage=torch.randn(len(chosen), generator=generator),
        old_logp=logps(),
        ref_logp=logps(),
    )


def save_engine(engine: PolicyEngine, folder: Path) -> None:
    Checkpoints(folder, engine.world, TrainConfig(async_save=False)).save(1, engine, {})


def load_engine(engine: PolicyEngine, folder: Path) -> None:
    checkpoints = Checkpoints(folder, engine.world, TrainConfig())
    checkpoints.load_engine(checkpoints.newest_state(resume=True), engine)


def make_engine(
    *, path: str | None = None, budget: int = 64, zero_stage: int = 0, temperature: float = 1.0, world: World = ALONE,
    dtype: str = "float32", total_updates: int = 10, gradient_checkpointing: bool = False, deepspeed: str | None = None,
    **optimizer,
) -> PolicyEngine:  # fmt: skip
    return PolicyEngine(
        ModelConfig(path=path or model_dir(), dtype=dtype, gradient_checkpointing=gradient_checkpointing),
        OptimizerConfig(**{"lr": 1e-4, "grad_clip": 1.0} | optimizer),
        TrainConfig(micro_batch_tokens=budget, **_zero(zero_stage, deepspeed)),
        world,
        temperature=temperature,
        total_updates=total_updates,
    )


def _zero(stage: int, deepspeed: str | None) -> dict:
    return with_stage_of_json({"train": {"deepspeed": deepspeed}})["train"] if deepspeed else {"zero_stage": stage}


def run_config(path: str | None = None, *, algorithm: dict | None = None, **rollout) -> Config:
    """Return a run's configuration with the helpers' model, for code that needs more than one section."""
    return validate_config({
        "run_dir": str(workspace() / "run"), "model": {"path": path or model_dir(), "dtype": "float32"},
        "data": {"train": "unused", "max_prompt_tokens": 128}, "rollout": {"engine": "hf"} | rollout,
        "algorithm": algorithm or {},
    })  # fmt: skip


def weights(engine: PolicyEngine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.policy.model.state_dict().items()}


def whole_weights(engine: PolicyEngine) -> dict[str, Tensor]:
    """Return unsharded `weights` under any ZeRO stage. Collective over the ranks."""
    return {name: value.clone() for name, value in named_weights(engine.policy, 1 << 20)}


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], *, exact: bool = False) -> None:
    """Compare weights after a few updates with a learning rate of 1e-4.

    AdamW divides by the gradient's size: where that is nearly 0, rounding alone moves a weight by part of the learning
    rate. Single weights may differ by that much, but not on average.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).abs()
        assert difference.max() <= (0 if exact else 5e-5), name
        assert difference.mean() <= 1e-6, name


# The oracle.


def plain_model(path, dtype=torch.float32, attention: str = "eager") -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation=attention)


def plain_inputs(prompt: Prompt, response: Tensor, model) -> dict:
    ids = torch.cat([prompt.token_ids, response])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.pixel_values is not None:
        inputs |= {
            "pixel_values": prompt.pixel_values.to(model.dtype),
            "image_grid_thw": prompt.image_grid_thw,
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        }
    return inputs


def plain_distribution(model, prompt: Prompt, response: Tensor, temperature: float = 1.0) -> Tensor:
    """Return [R, V] float64 log-probs of all tokens at each response position, without the image and video pads."""
    logits = model(**plain_inputs(prompt, response, model), use_cache=False).logits[0]
    start = len(prompt.token_ids) - 1
    logits = logits[start : start + len(response)].double() / temperature
    pads = torch.tensor([model.config.image_token_id, model.config.video_token_id])
    return torch.log_softmax(logits.index_fill(1, pads, LOWEST), dim=-1)


def plain_logp(model, batch: Sequences, temperature: float = 1.0) -> Tensor:
    """Return the float64 log-prob of each response token, [B, R], 0 in the padding."""
    rows = []
    for row, prompt in enumerate(batch.prompts):
        response = batch.response(row)
        rows.append(plain_distribution(model, prompt, response, temperature).gather(1, response[:, None]).squeeze(1))
    return pad_rows(rows, batch.tokens.shape[1])


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def near_batch(
    chosen: list[Prompt], lengths: list[int], model, *, temperature: float = 1.0, seed: int = 0
) -> UpdateBatch:
    """Return a `random_batch` with log-probs around the model's own, so that some ratios are clipped and most are not."""
    batch = random_batch(chosen, lengths, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        own = plain_logp(model, batch, temperature).float()

    def around(spread: float) -> Tensor:
        return torch.where(batch.mask, own + spread * torch.randn(own.shape, generator=generator), 0.0)

    return replace(batch, logp=around(0.4), old_logp=around(0.4), ref_logp=around(0.2))


def method_loss(dist: Tensor, target: Tensor, advantage, old: Tensor, ref: Tensor, sampler: Tensor, config) -> Tensor:
    """Return the loss of each token [R], in eager code. dist: [R, V] log-probs."""
    logp = dist.gather(1, target[:, None]).squeeze(1)
    entropy = -(dist.exp() * dist).sum(-1)
    psi = torch.minimum(config.entropy_alpha * entropy.detach(), advantage.abs() / config.entropy_kappa)
    shaped = advantage + psi
    ratio = torch.exp(logp - old)
    objective = torch.minimum(ratio * shaped, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * shaped)
    if config.dual_clip:
        objective = torch.where(shaped < 0, torch.maximum(objective, config.dual_clip * shaped), objective)
    weight = torch.exp(old - sampler).clamp(max=config.tis_cap) if config.tis_cap else 1.0
    k3 = torch.exp(ref - logp) - (ref - logp) - 1
    return -objective * weight + config.kl_coef * k3 - config.entropy_coef * entropy


class EagerTrainer:
    """Training step without our code: full logits, float64, one sequence at a time, torch's AdamW."""

    def __init__(self, path: str, *, grad_clip: float, temperature: float = 1.0, weight_decay: float = 0.01) -> None:
        self.model = plain_model(path, torch.float64)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=weight_decay)
        self._clip, self._temperature = grad_clip, temperature

    def update(self, batch: UpdateBatch, config) -> float:
        """Update the model. Return the gradient norm before clipping."""

        def loss(row: int, dist: Tensor, response: Tensor) -> Tensor:
            values = [values[row, : len(response)].double() for values in (batch.old_logp, batch.ref_logp, batch.logp)]
            return method_loss(dist, response, batch.advantage[row].double(), *values, config).sum()

        return self._step(batch, loss)

    def imitate(self, batch: Sequences) -> float:
        return self._step(batch, lambda _, dist, response: F.nll_loss(dist, response, reduction="sum"))

    def _step(self, batch: UpdateBatch, loss) -> float:
        self._optimizer.zero_grad()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # weight decay also applies to a tower without images
        for row, prompt in enumerate(batch.prompts):
            response = batch.response(row)
            dist = plain_distribution(self.model, prompt, response, self._temperature)
            (loss(row, dist, response) / batch.mask.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()

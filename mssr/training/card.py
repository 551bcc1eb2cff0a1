"""The model card of a run, in the hub's form: YAML metadata, then what the model is, what it reached, and how to use it."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mssr.config import Config, yaml_1_2
from mssr.policy.architectures import model_config
from mssr.policy.families import family_of
from mssr.training.run import CURVES
from mssr.training.summary import Summary

PAPER = "https://arxiv.org/abs/2512.18215"
# Shown even where they have their defaults; every other setting only where it has not.
MAIN = (
    "algorithm.name",
    "algorithm.kl_coef",
    "rollout.prompts_per_step",
    "rollout.responses_per_prompt",
    "rollout.max_response_tokens",
    "rollout.temperature",
    "train.responses_per_update",
    "train.optimizer.lr",
)
VISION = """import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "{path}"
model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto")
processor = AutoProcessor.from_pretrained(path)
question = "..."{instruction}
content = [{{"type": "image", "image": Image.open("picture.png")}}, {{"type": "text", "text": question}}]
inputs = processor.apply_chat_template(
    [{system}{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
with torch.no_grad():
    tokens = model.generate(**inputs, max_new_tokens={tokens})
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
TEXT = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{path}"
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(path)
question = "..."{instruction}
inputs = tokenizer.apply_chat_template(
    [{system}{{"role": "user", "content": question}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    tokens = model.generate(**inputs, max_new_tokens={tokens})
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def model_card(
    config: Config,
    records: Sequence[dict[str, Any]],
    summary: Summary,
    *,
    name: str,
    path: str | Path,
    adapter: bool = False,
    picture: bool = True,
) -> str:
    """Return the text of a README.md.

    records: lines of metrics.jsonl up to the step of these weights; summary: of the same lines.
    name: title of the card. path: of the model or adapter, or its name on the hub. picture: curves.png is beside the card.
    """
    vision = family_of(model_config(config.model.path)).has_vision
    lines = ["---", _metadata(config, summary, name, adapter, vision).to_yaml(), "---", ""]
    lines += _heading(config, summary, name, adapter)
    lines += ["", "## Scores", "", *_scores(config, records, summary)]
    if picture:
        lines += ["", f"![training curves]({CURVES})"]
    lines += ["", "## Use", "", *_use(config, path, adapter, vision)]
    lines += ["", "## Training", "", *_training(config, summary)]
    return "\n".join(lines) + "\n"


def _metadata(config: Config, summary: Summary, title: str, adapter: bool, vision: bool) -> ModelCardData:
    """Return the metadata of the hub. What it does not have, such as a folder as base model, is left out."""
    task = "image-text-to-text" if vision else "text-generation"
    base = config.model.path if _is_hub_name(config.model.path) else None
    results = None
    if summary.val_accuracy_after is not None:
        (validation,) = _sources(config.data.val)
        name = _without_split(validation) if _is_hub_name(_without_split(validation)) else Path(validation).name
        value = round(100 * summary.val_accuracy_after, 2)
        results = [EvalResult(task, name, name, "accuracy", value, metric_name="accuracy (%)")]
    return ModelCardData(
        base_model=base,
        base_model_relation=base and ("adapter" if adapter else "finetune"),
        datasets=[name for source in _sources(config.data.train) if _is_hub_name(name := _without_split(source))]
        or None,
        eval_results=results,
        library_name="peft" if adapter else "transformers",
        model_name=title,
        pipeline_tag=task,
        tags=["mssr", "reinforcement-learning", config.algorithm.name],
    )


def _heading(config: Config, summary: Summary, title: str, adapter: bool) -> list[str]:
    what = "LoRA adapter for" if adapter else "Trained from"
    return [
        f"# {title}",
        "",
        f"{what} `{config.model.path}` by reinforcement learning with MSSR ([paper]({PAPER})), algorithm "
        f"`{config.algorithm.name}`, {summary.steps:,} steps, seed {config.seed}.",
    ]


def _scores(config: Config, records: Sequence[dict[str, Any]], summary: Summary) -> Iterator[str]:
    validations = [line for line in records if "val/accuracy" in line]
    if not validations:
        yield "No validation data."
        return
    first, last = validations[0], validations[-1]
    yield f"On `{config.data.val}`, temperature {config.eval.temperature:g}:"
    yield ""
    yield f"| | step {first['step']} | step {last['step']} |"
    yield "|---|---|---|"
    for key in last:
        if key.startswith("val/") and not isinstance(last[key], list):
            yield f"| {key.removeprefix('val/')} | {_number(key, first.get(key))} | {_number(key, last[key])} |"
    yield ""
    yield f"Best accuracy: {summary.val_accuracy_best:.1%} at step {summary.best_step}."


def _number(key: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.1%}" if key in ("val/accuracy", "val/truncated") else f"{value:.4g}"


def _use(config: Config, path: str | Path, adapter: bool, vision: bool) -> Iterator[str]:
    data, instruction, system = config.data, "", ""
    if data.template is not None:
        instruction = f"  # as {data.template} makes it"
    if appended := data.appended(conversation=False):
        only = "  # after a plain problem, not after a conversation" if data.instruction is None else ""
        ending = "\n" + appended
        instruction += f"\nquestion += {ending!r}{only}"
    if data.system_prompt is not None:
        text = [{"type": "text", "text": data.system_prompt}] if vision else data.system_prompt
        system = f"{{'role': 'system', 'content': {text!r}}}, "
    code = (VISION if vision else TEXT).format(
        path=path, instruction=instruction, system=system, tokens=config.rollout.max_response_tokens
    )
    if adapter:
        code = code.replace("import torch\n", "import torch\nfrom peft import PeftModel\n", 1)
        load = f'.from_pretrained("{config.model.path}", dtype="auto")\nmodel = PeftModel.from_pretrained(model, path)'
        code = code.replace('.from_pretrained(path, dtype="auto")', load, 1)
        code = code.replace(".from_pretrained(path)\nquestion", f'.from_pretrained("{config.model.path}")\nquestion', 1)
    yield from ("```python", *code.splitlines(), "```", "", "With vLLM:", "", "```")
    yield (
        f"vllm serve {config.model.path} --enable-lora --lora-modules mssr={path}" if adapter else f"vllm serve {path}"
    )
    yield "```"


def _training(config: Config, summary: Summary) -> Iterator[str]:
    cost, gap = summary.cost, summary.logp_gap
    yield f"- data: {', '.join(f'`{source}`' for source in _sources(config.data.train))}"
    spent = [f"{value:,} {name.replace('_', ' ')}" for name, value in cost.items()]
    yield f"- cost: {', '.join(spent)}"
    if summary.peak_memory_gib is not None:
        yield f"- memory: at most {summary.peak_memory_gib:.1f} GiB per rank"
    if gap["mean"] is not None:
        yield (
            f"- difference between the sampler's and the trainer's log-probs: {gap['mean']:.2g} nats per token on average, "
            f"{gap['max']:.2g} at most"
        )
    if summary.versions:
        yield f"- versions: {', '.join(f'{name} {version}' for name, version in summary.versions.items())}"
    if summary.command:
        yield from ("", "Command:", "", "```", summary.command, "```")
    yield from ("", "Settings, besides the defaults:", "", "```yaml")
    yield yaml_1_2.dump(_settings(config), sort_keys=False).rstrip()
    yield "```"


def _settings(config: Config) -> dict[str, Any]:
    """Return the main settings, and the others that differ from their defaults."""
    everything = config.model_dump(mode="json")
    shown = config.model_dump(mode="json", exclude_defaults=True, exclude={"run_dir", "sft", "log"})
    for key in MAIN:
        *sections, last = key.split(".")
        values, place = everything, shown
        for section in sections:
            values, place = values[section], place.setdefault(section, {})
        place[last] = values[last]
    return shown


def _sources(data: Any) -> list[str]:
    """Return the files or hub names of data.train or data.val: one, several, or a mapping from them to weights."""
    return [] if data is None else [data] if isinstance(data, str) else list(data)


def _without_split(source: str) -> str:
    return source.partition(":")[0]


def _is_hub_name(name: str) -> bool:
    """Whether it is OWNER/NAME, and no file or folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists() and not name.endswith((".parquet", ".jsonl", ".json"))

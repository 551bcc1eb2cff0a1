"""Tiny models of every family, their prompts, and the oracle: plain transformers, full logits, one sequence at a time."""

from functools import cache

import torch
from policy_helpers import DATA, LOWEST, PICTURE_SIZES, _resized, digit_rows, plain_inputs, workspace
from torch import Tensor
from transformers import AutoConfig

from examples.tiny.model import write_tiny_model
from mssr.batch import Prompt, Sequences, pad_rows
from mssr.data.prompts import PromptEncoder, load_processors
from mssr.policy.families import FAMILIES, family_of
from mssr.policy.loading import load_policy
from mssr.policy.model import Policy

VISION = [name for name, family in FAMILIES.items() if family.has_vision]


@cache
def family_dir(family: str) -> str:
    """Return a tiny model with weights large enough that a log-prob depends on the token's position and neighbours."""
    folder = workspace() / f"family_{family}"
    if folder.exists():
        return str(folder)
    corpus = [row["problem"] + row["solution"] for row in digit_rows()]
    write_tiny_model(folder, corpus, family=family, hidden=64, vocabulary=300)
    model, generator = family_plain(folder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            large = "embed_tokens" in name or "lm_head" in name
            if parameter.ndim > 1:
                parameter.normal_(std=0.12 if large else 0.06, generator=generator)
            elif "norm" in name and "bias" not in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=0.06, generator=generator)
    model.save_pretrained(folder)
    return str(folder)


def family_plain(path, dtype=torch.float32, attention: str = "eager"):
    """Return the model in plain transformers, without our class and attention."""
    return family_of(AutoConfig.from_pretrained(path)).auto_class.from_pretrained(
        path, dtype=dtype, attn_implementation=attention
    )


def family_policy(family: str) -> Policy:
    return load_policy(family_dir(family), torch.float32)


@cache
def family_prompts(family: str) -> tuple[Prompt, ...]:
    """Return six prompts. If the family has vision: images of different sizes; one prompt has none, one has two."""
    encoder = PromptEncoder(*load_processors(family_dir(family)), DATA)
    made = []
    for number, sizes in enumerate(PICTURE_SIZES):
        row = digit_rows()[number]
        images = [_resized(row["images"][0], size) for size in sizes] if family in VISION else []
        text = row["problem"].removeprefix("<image>") + " !" * number
        made.append(encoder.encode(row | {"images": images, "problem": text}, number, "digits"))
    return tuple(made)


def never_sampled(model) -> list[int]:
    names = ("image_token_id", "video_token_id")
    return [getattr(model.config, name) for name in names if hasattr(model.config, name)]


def family_distribution(model, prompt: Prompt, response: Tensor) -> Tensor:
    """Return [R, V] float64 log-probs of all tokens at each response position."""
    logits = model(**plain_inputs(prompt, response, model), use_cache=False).logits[0]
    start = len(prompt.token_ids) - 1
    logits = logits[start : start + len(response)].double()
    forbidden = torch.tensor(never_sampled(model), dtype=torch.int64)
    return torch.log_softmax(logits.index_fill(1, forbidden, LOWEST), dim=-1)


def family_logp(model, batch: Sequences) -> Tensor:
    """Return the float64 log-prob of each response token, [B, R], 0 in the padding."""
    rows = []
    for row, prompt in enumerate(batch.prompts):
        response = batch.response(row)
        rows.append(family_distribution(model, prompt, response).gather(1, response[:, None]).squeeze(1))
    return pad_rows(rows, batch.tokens.shape[1])

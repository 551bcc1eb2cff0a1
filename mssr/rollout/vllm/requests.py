"""Converts our prompts to vLLM's requests.

vLLM gets what the trainer trains on: token ids with image tokens expanded, and preprocessed pixels. So neither
tokenisation nor preprocessing can differ from the trainer's.
"""

from collections.abc import Sequence

from torch import Tensor

from mssr.batch import Prompt
from mssr.rollout.base import Sampling

NEVER = -1e9  # added to a logit; finite, since it is also sent as JSON


def engine_input(prompt: Prompt, image_token_id: int | None, merge_size: int | None) -> dict:
    """Return the prompt as input of vLLM's engine (`vllm.inputs.engine`): text, or text and preprocessed images.

    image_token_id, merge_size: the policy's; None for a text-only model. All families with images take patches and grids,
    from which vLLM also computes the rotary positions.
    """
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    token_ids = prompt.token_ids.tolist()
    if prompt.pixel_values is None:
        return tokens_input(token_ids)
    patches = prompt.image_grid_thw.prod(1)
    items = MultiModalKwargsItems.from_hf_inputs(
        {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw},
        {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", patches),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        },
    )
    tokens = (patches // merge_size**2).tolist()
    places = [
        PlaceholderRange(offset=offset, length=length)
        for offset, length in zip(image_offsets(prompt.token_ids, tokens, image_token_id), tokens)
    ]
    # The key of vLLM's caches: an image of a prompt. The same picture in another prompt is encoded again.
    hashes = [f"{prompt.key}/{number}" for number in range(len(tokens))]
    return mm_input(token_ids, {"image": items["image"]}, {"image": hashes}, {"image": places})


def image_offsets(token_ids: Tensor, tokens: list[int], image_token_id: int) -> list[int]:
    """Return where each image's tokens begin in the prompt. token_ids: [P]. tokens: number of tokens of each image."""
    places = (token_ids == image_token_id).nonzero().flatten().tolist()
    offsets, start = [], 0
    for count in tokens:
        offsets.append(places[start])
        start += count
    return offsets


def sampling_params(
    sampling: Sampling, max_tokens: int, ends: list[int], forbidden: list[int], stop: Sequence[str] = ()
) -> dict:
    """Return arguments of `vllm.SamplingParams` for the policy's own distribution without `forbidden` tokens.

    vLLM takes these out first, then applies temperature, top_k and top_p; the log-probs it reports are of what is left.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": max_tokens,
        "logprobs": 0,  # of the sampled token only
        "stop_token_ids": ends,
        "ignore_eos": True,  # `ends` has all end tokens; the generation config must not add others
        "logit_bias": dict.fromkeys(forbidden, NEVER),
        "stop": list(stop),
        "detokenize": bool(stop),
        "skip_special_tokens": False,
    }

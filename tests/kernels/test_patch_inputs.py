"""A call with `target` gives the backbone the inputs of the model's own forward, images included, but no cache."""

import copy

import pytest
import torch
from patched_models import TEXT, WIDTH, assert_same_gradients, batch, expected, gradients, tiny, with_large_weights
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText

from mssr_kernels import check_patch, next_token_target, patch
from mssr_kernels.modes import ops

VISION = dict(num_heads=4, hidden_size=WIDTH, intermediate_size=48, out_hidden_size=WIDTH, depth=2)
TOWER = dict(
    hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
)  # fmt: skip
QWEN = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
FAMILIES = {
    "qwen2_5_vl": (VISION | {"fullatt_block_indexes": [0, 1]}, {"mrope_section": [1, 1, 2]}, QWEN),
    "qwen3_vl": (
        VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
        QWEN,
    ),
    "gemma3": (TOWER, None, dict(image_token_index=90, image_token_id=90, mm_tokens_per_image=4)),
    "llava": (TOWER | {"model_type": "clip_vision_model"}, None, dict(image_token_id=90, image_token_index=90)),
}
TOKENS = torch.tensor([[5, 92, 90, 90, 90, 90, 93, 7, 8, 9, 10, 2]])


def with_images(family):
    """Return a model and a function that makes its inputs: one image of four tokens, with new pixels at each call."""
    vision, rotary, options = FAMILIES[family]
    text = TEXT | ({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0} | rotary} if rotary else {})
    if family == "gemma3":
        text |= {"final_logit_softcapping": 3.0, "sliding_window": 16, "query_pre_attn_scalar": 8}
    if family == "llava":
        text |= {"model_type": "llama"}
    config = AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=True, attn_implementation="eager", **options
    )
    model = with_large_weights(AutoModelForImageTextToText.from_config(config))
    is_image = (TOKENS == 90).long()
    side = {"qwen2_5_vl": 14, "qwen3_vl": 16}.get(family)

    def inputs():
        text = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
        if side:
            pixels = torch.randn(16, 3 * 2 * side * side)
            grid = torch.tensor([[1, 4, 4]])
            return text | {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": is_image.int()}
        types = {"token_type_ids": is_image} if family == "gemma3" else {}
        return text | types | {"pixel_values": torch.randn(1, 3, 8, 8)}

    return model, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_images(family):
    model, inputs = with_images(family)
    stock, given = copy.deepcopy(model), inputs()
    patch(model)
    target = next_token_target(TOKENS, torch.arange(12)[None] > 6)
    assert check_patch(model, **given) < 1e-4
    out = model(**given, target=target)
    logp, _ = expected(stock, target, **given)
    torch.testing.assert_close(out.logp.double(), logp, rtol=1e-5, atol=2e-5)
    assert_same_gradients(gradients(model, out.logp.sum()), gradients(stock, logp.sum()))
    assert (model(**inputs(), target=target).logp - out.logp).abs().max() > 1e-2  # the pixels matter


@pytest.mark.parametrize("family", ["text", *FAMILIES])
def test_no_cache_is_kept_unless_it_is_asked_for(family):
    """Also for backbones that do not name use_cache but pass it on."""
    model, inputs = with_images(family) if family != "text" else (tiny(), lambda: {"input_ids": TOKENS})
    patch(model)
    caches = []
    model.model.register_forward_hook(lambda module, given, out: caches.append(out.past_key_values))
    given, target = inputs(), next_token_target(TOKENS)
    for options in ({}, {"use_cache": True}, {"use_cache": None}):
        model(**given, target=target, **options)
    assert caches[0] is None and len(caches[1]) == 2 and caches[2] is None


def test_left_padding():
    """A padded row has the log-probs of the same row without padding."""
    model, (tokens, target) = patch(tiny()), batch()
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.int64), tokens], dim=1)
    mask = (torch.arange(13) >= 4).long().expand(2, 13)
    wide = torch.cat([torch.full((2, 4), -100), target], dim=1)
    out = model(padded, target=wide, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(out.logp[:, 4:], model(tokens, target=target).logp, rtol=1e-5, atol=2e-5)


def test_positions():
    """Two sequences in one row are separated by their positions."""
    model, (tokens, _) = patch(tiny()), batch(rows=1, length=10)
    positions, target = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]), next_token_target(tokens)
    out = model(tokens, target=target, position_ids=positions)
    wanted, _ = expected(model, target, input_ids=tokens, position_ids=positions, use_cache=False)
    torch.testing.assert_close(out.logp.double(), wanted, rtol=1e-5, atol=2e-5)
    alone = model(tokens[:, 6:], target=target[:, 6:]).logp
    torch.testing.assert_close(out.logp[:, 6:], alone, rtol=1e-5, atol=2e-5)
    assert (model(tokens, target=target).logp[:, 6:] - alone).abs().max() > 1e-2


class HeadProducts(TorchDispatchMode):
    """Records N of each product with the head: [N, D] by [D, V] or its transpose, and [V, N] by [N, D]."""

    def __init__(self, width: int, vocab: int):
        super().__init__()
        self.shape, self.rows = (width, vocab), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mssr_kernels":
            with self:
                return getattr(ops, function.overloadpacket.__name__)(*args, **kwargs or {})
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = [value for value in args if isinstance(value, torch.Tensor)][-2:]
            sizes = [a.shape[0], a.shape[1], b.shape[1]]
            if self.shape[1] in sizes:
                sizes.remove(self.shape[1])
                sizes.remove(self.shape[0])
                self.rows += sizes
        return function(*args, **kwargs or {})


def test_positions_without_target_are_never_multiplied_with_the_head():
    model, (tokens, target) = patch(tiny()), batch(rows=3, length=17)
    rows = int((target != -100).sum())
    advantage = torch.randn(target.shape)
    for arguments, products in (({"advantage": advantage}, 3), ({}, 4)):
        with HeadProducts(WIDTH, TEXT["vocab_size"]) as work:
            out = model(tokens, target=target, **arguments)
            (out.loss if arguments else out.logp.sum()).backward()
        assert sum(work.rows) == products * rows

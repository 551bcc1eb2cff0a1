"""Memory of one micro-batch besides the weights, from the real layers on the meta device."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import sdpa_mask

from mssr.config.schema import ModelConfig
from mssr.planning.ledger import FusedAttention, MemoryLedger
from mssr.policy.attention import PackedLayout, packed, packed_sdpa
from mssr.policy.families import family_of
from mssr.policy.loading import CPU, apply_options
from mssr.policy.model import Policy
from mssr_kernels import explain

_PADDED, _PACKED = "mssr_planned_sdpa", "mssr_planned_varlen"


@dataclass(frozen=True)
class MicroBatchShape:
    """lengths: tokens of each packed sequence. response_tokens: of all of them. grids: `image_grid_thw` of each image."""

    lengths: tuple[int, ...]
    response_tokens: int
    grids: tuple[tuple[int, int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def patches(self) -> int:
        return sum(frames * height * width for frames, height, width in self.grids)


@dataclass(frozen=True)
class Trace:
    """Bytes besides the weights.

    kept: activations that the forward pass keeps for the backward pass, and the head's gradients.
    peak: of both passes; with `accumulated` it includes the gradients.
    scoring: peak of a forward pass that keeps nothing.
    """

    kept: int
    peak: int
    scoring: int


def planned_policy(config: PretrainedConfig, dtype: torch.dtype, options: ModelConfig) -> Policy:
    """Return the policy as `load_policy` makes it, on the meta device."""
    family = family_of(config)
    with torch.device("meta"):
        policy = Policy(family.auto_class.from_config(config, dtype=dtype, attn_implementation=_PADDED))
    # The kernels of attention and layers depend on the machine; stand-ins replace them here.
    apply_options(policy, options.model_copy(update={"attention": "sdpa", "liger": "off"}), CPU)
    # Whether flash-attn is installed on the machine that is planned for is not known here.
    policy.model.set_attn_implementation(_PACKED if options.attention == "flash" else _PADDED)
    return policy.train()


def trace(policy: Policy, shape: MicroBatchShape, *, device: str, accumulated: bool, micro_batches: int = 2) -> Trace:
    """Run a micro-batch through a `planned_policy`, forward and backward; it keeps hooks and gradients.

    device: "cuda" or "cpu", for the head's kernels.
    accumulated: each parameter keeps its gradient, to which later micro-batches add (at most 2 are run);
        False: ZeRO takes each gradient as soon as it is made; its memory is counted elsewhere.
    """
    workspace = _head_workspace(policy.model.lm_head.weight, shape, device)
    if not accumulated:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
    scoring, ledger = MemoryLedger(), MemoryLedger()
    with torch.no_grad(), scoring:
        _hidden(policy, shape).new_empty(workspace, dtype=torch.uint8)
    with ledger:
        for _ in range(min(micro_batches, 2) if accumulated else 1):
            before = ledger.live
            loss = _Head.apply(_hidden(policy, shape), policy.model.lm_head.weight, workspace)
            kept = ledger.live - before
            loss.backward()
            del loss
    return Trace(kept, ledger.peak, scoring.peak)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _hidden(policy: Policy, shape: MicroBatchShape) -> Tensor:
    """Hidden states of the policy's head, [N, D]."""
    ids = torch.zeros(1, shape.tokens, dtype=torch.int64, device="meta")
    embeddings = policy.model.get_input_embeddings()(ids)
    if policy.family.has_vision and shape.grids:
        embeddings = _with_images(policy, embeddings, shape)
    axes = (4, 1, shape.tokens) if policy.family.has_vision else (1, shape.tokens)
    out = policy.language_model(
        inputs_embeds=embeddings,
        position_ids=torch.zeros(axes, dtype=torch.int64, device="meta"),
        use_cache=False,
        **packed(PackedLayout.of(list(shape.lengths), "meta")),
    )
    predicts = torch.zeros(shape.response_tokens, dtype=torch.int64, device="meta")
    return out.last_hidden_state[0].index_select(0, predicts)


def _with_images(policy: Policy, embeddings: Tensor, shape: MicroBatchShape) -> Tensor:
    vision = policy.model.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(shape.patches, width, device="meta").to(embeddings.dtype)
    # The tower reads the grids for positions (only their shape matters here) and for the attention windows. Two windows
    # take the same memory as a hundred, in a fiftieth of the time.
    positions = torch.zeros(shape.patches, 2, dtype=torch.int64, device="meta")
    windows = torch.tensor([0, shape.patches // 2, shape.patches], dtype=torch.int32)
    given = {"cu_seqlens": windows, "position_ids": positions}
    if hasattr(vision, "fullatt_block_indexes"):
        order = torch.arange(shape.patches // policy.merge_size**2)
        given |= {"window_index": order, "cu_window_seqlens": windows}
    out = policy.vision_tower(pixels, grid_thw=torch.tensor(shape.grids), **given)
    image_tokens = torch.zeros(embeddings.shape, dtype=torch.bool, device="meta")
    embeddings = embeddings.masked_scatter(image_tokens, out.pooler_output.to(embeddings.dtype))
    for features in getattr(out, "deepstack_features", None) or ():
        embeddings = embeddings + features.sum() * 0
    return embeddings


def _head_workspace(weight: Tensor, shape: MicroBatchShape, device: str) -> int:
    """Bytes of the head's workspace: its limit, or if that is less, the logits of all rows and their scratch."""
    vocabulary, width = weight.shape
    rows = shape.response_tokens
    plan = explain(rows, width, vocabulary, dtype=weight.dtype, device=device, weight_grad=weight.requires_grad)
    logits = 4 * plan.chunk_rows * vocabulary
    return min(plan.workspace_bytes, logits + min(logits, plan.workspace_bytes // 8))


class _Head(torch.autograd.Function):
    """Memory of the fused loss: the forward pass makes its gradients in float32, the backward pass rounds them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, workspace: int) -> Tensor:
        gradients = [
            torch.empty_like(tensor, dtype=torch.float32) if tensor.requires_grad else None
            for tensor in (hidden, weight)
        ]
        hidden.new_empty(workspace, dtype=torch.uint8)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*gradients)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        return *(None if gradient is None else gradient.to(ctx.dtype) for gradient in ctx.saved_tensors), None


def _padded(*args, **kwargs):
    with FusedAttention():  # here, not around the model: a recomputed layer runs inside the backward pass
        return packed_sdpa(*args, **kwargs)


def _varlen(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, packed_layout=None, **kwargs):
    if packed_layout is None or not module.is_causal:
        return _padded(module, query, key, value, attention_mask, **kwargs)
    with FusedAttention():
        return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None


for name, function in ((_PADDED, _padded), (_PACKED, _varlen)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)

"""The policy model: backbone, fused head, rotary positions of a prompt."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from mssr.batch import Prompt
from mssr.policy.attention import SDPA, packed
from mssr.policy.families import family_of
from mssr.policy.packing import MicroBatch
from mssr_kernels import FusedLMHead, LogprobEntropy, PolicyLoss, PolicyLossConfig

_POSITIONS_KEPT = 16_384  # prompts; a few hundred bytes to a few kilobytes each


class Policy(nn.Module):
    """A transformers model of a supported family whose LM head computes log-probs, entropy and the policy loss.

    Full logits are formed only for generation, one position at a time. Image and video pads have probability 0 everywhere,
    because a sampled pad would need an image.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.family = family_of(model.config)
        # Only forward changes: module, parameter and name in the state dict stay.
        model.lm_head.__class__ = FusedLMHead
        model.lm_head.forbid(self.forbidden_token_ids)
        self._positions: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def language_model(self) -> nn.Module:
        """Token embedding, layers and final norm."""
        return self.model.model.language_model if self.family.has_vision else self.model.model

    @property
    def vision_tower(self) -> nn.Module | None:
        return self.model.model.visual if self.family.has_vision else None

    @property
    def image_token_id(self) -> int | None:
        """None for a text model."""
        return getattr(self.model.config, "image_token_id", None)

    @property
    def merge_size(self) -> int | None:
        """Patches per side of an image token; None for a text model."""
        return self.model.config.vision_config.spatial_merge_size if self.family.has_vision else None

    @property
    def forbidden_token_ids(self) -> list[int]:
        """Tokens with probability 0, which are never sampled."""
        config = self.model.config
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        return sorted({token for token in ids if token is not None})

    @property
    def partitioned(self) -> bool:
        """Whether ZeRO-3 shards the parameters: then every module call is a collective."""
        return hasattr(next(self.parameters()), "ds_id")  # all of them, or none

    def forward(
        self,
        micro_batch: MicroBatch,
        temperature: float,
        *,
        config: PolicyLossConfig | None = None,
        advantage: Tensor | None = None,
        **loss_inputs: Tensor | float | None,
    ) -> LogprobEntropy | PolicyLoss:
        """Return log-probs and entropies of the N response tokens ([N] float32), or with `advantage` their policy loss.

        advantage and every tensor of `loss_inputs` are [N] float32, in the micro-batch's token order.
        """
        hidden = self._hidden(micro_batch)
        if advantage is None:
            return self.model.lm_head(hidden, micro_batch.target, temperature=temperature)
        return self.model.lm_head(
            hidden, micro_batch.target, advantage, config=config, temperature=temperature, **loss_inputs
        )

    def attention_slots(self, micro_batch: MicroBatch) -> int:
        """Return the number of token positions that attention computes for the micro-batch, padding included."""
        padded = self.language_model.config._attn_implementation == SDPA
        return micro_batch.layout.slots if padded else micro_batch.input_ids.shape[1]

    def _hidden(self, micro_batch: MicroBatch) -> Tensor:
        """Return the hidden states that predict the response tokens, [N, D]."""
        with self._idle_vision() if self._needs_idle_vision(micro_batch) else nullcontext():
            out = self.model.model(
                input_ids=micro_batch.input_ids,
                use_cache=False,
                **packed(micro_batch.layout),
                **self.family.inputs(micro_batch),
            )
        return out.last_hidden_state[0].index_select(0, micro_batch.predicts)

    def _needs_idle_vision(self, micro_batch: MicroBatch) -> bool:
        if not self.family.has_vision or micro_batch.pixel_values is not None:
            return False
        trained = any(weight.requires_grad for weight in self.vision_tower.parameters())
        return self.partitioned or (trained and torch.is_grad_enabled())

    @contextmanager
    def _idle_vision(self) -> Iterator[None]:
        """Context in which the vision tower runs on a blank image and adds zero to the token embeddings, [1, L, D].

        A rank without images must run the tower too, or the others wait forever for its gradients (ZeRO-3: parameters).
        It must run at the same point, after the embedding and inside the model's call: ZeRO-2 reduces gradients in the
        order of the backward pass, ZeRO-3 gathers parameters in the order of module calls, and ranks must agree on both.

        Qwen3-VL's tower has mergers between its blocks. Real images add their features behind language layers, the blank
        one at the embedding. The order is the same: forward, mergers run inside the tower; backward, autograd runs the
        latest operation first, so the language model comes before the last merger, and each merger before its block.
        """

        def add_zero(module: nn.Module, args: tuple, embeddings: Tensor) -> Tensor:
            return embeddings + self.family.blank_image(self.model, embeddings).to(embeddings.dtype) * 0.0

        handle = self.model.get_input_embeddings().register_forward_hook(add_zero)
        try:
            yield
        finally:
            handle.remove()

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """Return the prompt's temporal, height and width rotary positions, [3, P] int64, by the model's own rule."""
        positions = self._positions.get(prompt.key)
        if positions is None:
            positions = self.family.prompt_positions(self.model, prompt)
            self._positions[prompt.key] = positions
            if len(self._positions) > _POSITIONS_KEPT:
                self._positions.popitem(last=False)
        return positions

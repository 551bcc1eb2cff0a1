"""The model as the trainer sees it: backbone, fused head, rotary positions of a prompt."""

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
    """A transformers model of a supported family whose LM head computes log-probs, entropy and the policy loss itself.

    Full logits exist only for single positions, while generating. Image and video pads have probability 0 in all of it:
    no sampler draws them (the trainer would look for an image that is not there), so the policy is the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.family = family_of(model.config)
        # Same module, same parameter, same name in the state dict: only what forward can do is new.
        model.lm_head.__class__ = FusedLMHead
        model.lm_head.forbid(self.forbidden_token_ids)
        self._positions: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def language_model(self) -> nn.Module:
        """Token embedding, layers and last norm."""
        return self.model.model.language_model if self.family.has_vision else self.model.model

    @property
    def vision_tower(self) -> nn.Module | None:
        return self.model.model.visual if self.family.has_vision else None

    @property
    def image_token_id(self) -> int | None:
        """None where the model reads text alone."""
        return getattr(self.model.config, "image_token_id", None)

    @property
    def merge_size(self) -> int | None:
        """Patches a side that make one image token; None where the model reads text alone."""
        return self.model.config.vision_config.spatial_merge_size if self.family.has_vision else None

    @property
    def forbidden_token_ids(self) -> list[int]:
        """Tokens that are never sampled and have probability 0."""
        config = self.model.config
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        return sorted({token for token in ids if token is not None})

    @property
    def partitioned(self) -> bool:
        """Whether ZeRO-3 holds the parameters: then every module call is a collective, the same on all ranks."""
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
        """Log-probs and entropies of the N response tokens ([N] float32), or with `advantage` their policy loss.

        advantage and every tensor of `loss_inputs` are [N] float32, in the micro-batch's token order.
        """
        hidden = self._hidden(micro_batch)
        if advantage is None:
            return self.model.lm_head(hidden, micro_batch.target, temperature=temperature)
        return self.model.lm_head(
            hidden, micro_batch.target, advantage, config=config, temperature=temperature, **loss_inputs
        )

    def attention_slots(self, micro_batch: MicroBatch) -> int:
        """Token positions that attention computes for the micro-batch, padding included."""
        padded = self.language_model.config._attn_implementation == SDPA
        return micro_batch.layout.slots if padded else micro_batch.input_ids.shape[1]

    def _hidden(self, micro_batch: MicroBatch) -> Tensor:
        """[N, D], the hidden states that predict the response tokens; the prompt's never reach the head."""
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
        """In here the tokens' embeddings, [1, L, D], come with a zero that the vision tower computed.

        Ranks whose micro-batch has no image must run the tower too, or the others wait for its gradients (ZeRO-3: for its
        parameters) for ever. And they must run it where images would come in, after the embedding and inside the model's
        own call: ZeRO-2 sums gradients over ranks in the order in which the backward pass makes them, ZeRO-3 gathers
        parameters in the order of the module calls, so one rank's order must be every rank's.

        All of the tower: Qwen3-VL's has mergers between its blocks, whose features an image adds behind layers of the
        language model, and here at the embedding like the rest. The order is the same: the mergers are called inside
        of the tower either way, and the backward pass takes of all that it could do what was done last in the forward
        pass, so the whole language model comes before the tower's last merger, and each merger before the block it is on.
        """

        def add_zero(module: nn.Module, args: tuple, embeddings: Tensor) -> Tensor:
            return embeddings + self.family.blank_image(self.model, embeddings).to(embeddings.dtype) * 0.0

        handle = self.model.get_input_embeddings().register_forward_hook(add_zero)
        try:
            yield
        finally:
            handle.remove()

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """[3, P] int64: temporal, height and width rotary positions of the prompt, by the model's own rule."""
        positions = self._positions.get(prompt.key)
        if positions is None:
            positions = self.family.prompt_positions(self.model, prompt)
            self._positions[prompt.key] = positions
            if len(self._positions) > _POSITIONS_KEPT:
                self._positions.popitem(last=False)
        return positions

"""The vision-language model as the trainer sees it: backbone, fused head, rotary positions of a prompt."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from mssr.batch import Prompt
from mssr.policy.packing import MicroBatch
from mssr_kernels import FusedLMHead, LogprobEntropy, PolicyLoss, PolicyLossConfig

_POSITIONS_KEPT = 16_384  # prompts; a few hundred bytes to a few kilobytes each


class Policy(nn.Module):
    """A transformers vision-language model whose LM head computes log-probs, entropy and the policy loss itself.

    Full logits exist only for single positions, while generating. Image and video pads have probability 0 in all of it:
    no sampler draws them (the trainer would look for an image that is not there), so the policy is the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Same module, same parameter, same name in the state dict: only what forward can do is new.
        model.lm_head.__class__ = FusedLMHead
        model.lm_head.forbid(self.forbidden_token_ids)
        self._positions: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

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

    def _hidden(self, micro_batch: MicroBatch) -> Tensor:
        """[N, D], the hidden states that predict the response tokens; the prompt's never reach the head."""
        idle_vision = micro_batch.pixel_values is None and (torch.is_grad_enabled() or self.partitioned)
        with self._idle_vision() if idle_vision else nullcontext():
            out = self.model.model(
                input_ids=micro_batch.input_ids,
                attention_mask={"full_attention": micro_batch.layout},
                position_ids=micro_batch.position_ids,
                mm_token_type_ids=micro_batch.mm_token_type_ids,
                pixel_values=micro_batch.pixel_values,
                image_grid_thw=micro_batch.image_grid_thw,
                use_cache=False,
            )
        return out.last_hidden_state[0].index_select(0, micro_batch.predicts)

    @contextmanager
    def _idle_vision(self) -> Iterator[None]:
        """In here the tokens' embeddings, [1, L, D], come with a zero that the vision tower computed.

        Ranks whose micro-batch has no image must run the tower too, or the others wait for its gradients (ZeRO-3: for its
        parameters) for ever. And they must run it where images would come in, after the embedding and inside the model's
        own call: ZeRO-2 sums gradients over ranks in the order in which the backward pass makes them, ZeRO-3 gathers
        parameters in the order of the module calls, so one rank's order must be every rank's.
        """

        def add_zero(module: nn.Module, args: tuple, embeddings: Tensor) -> Tensor:
            return embeddings + self._blank_image(embeddings).to(embeddings.dtype) * 0.0

        handle = self.model.get_input_embeddings().register_forward_hook(add_zero)
        try:
            yield
        finally:
            handle.remove()

    def _blank_image(self, like: Tensor) -> Tensor:
        """0-d: the sum of what the vision tower makes of the smallest black image. like: gives dtype and device."""
        vision = self.model.config.vision_config
        side = vision.spatial_merge_size
        grid = torch.tensor([[1, side, side]], device=like.device)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return self.model.model.visual(like.new_zeros(side * side, width), grid_thw=grid).pooler_output.sum()

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """[3, P] int64: temporal, height and width rotary positions of the prompt, by the model's own rule."""
        positions = self._positions.get(prompt.key)
        if positions is None:
            ids = prompt.token_ids[None]
            if prompt.image_grid_thw is None:
                positions = torch.arange(ids.shape[1]).expand(3, -1)
            else:
                types = (ids == self.image_token_id).int()
                positions = self.model.model.get_rope_index(ids, types, prompt.image_grid_thw)[0][:, 0]
            self._positions[prompt.key] = positions
            if len(self._positions) > _POSITIONS_KEPT:
                self._positions.popitem(last=False)
        return positions

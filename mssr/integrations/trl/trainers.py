"""TRL's own trainers, with log-probs and entropy from our head."""

from trl import GRPOTrainer, RLOOTrainer

from mssr.errors import UserError
from mssr.integrations.trl.fused_head import fuse_head


class FusedHead:
    """Mixin, to the left of a TRL trainer that scores with `fused_lm_head=True`: GRPOTrainer, RLOOTrainer or a subclass.

        class MyTrainer(FusedHead, MyGRPOTrainer): ...

    Our head computes log-probs and entropies of the policy and the frozen reference (in float32, of the scored tokens
    only, without logits); everything else is the trainer's own. The entropy comes from the same pass and needs a
    backward pass only if the loss depends on it.

    Raises:
        UserError: at construction, an option or a model that our head does not support.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self, GRPOTrainer | RLOOTrainer):  # others need more of the head than log-probs and entropy
            raise UserError(
                f"FusedHead: {type(self).__name__} is not a GRPOTrainer or RLOOTrainer; leave the mixin out"
            )
        if getattr(self.args, "cast_lm_head_to_fp32", False):
            raise UserError(
                "cast_lm_head_to_fp32: the fused head computes in float32 from 16-bit weights anyway; set it to False, "
                "or use TRL's own trainer for a head with float32 weights"
            )
        for model in (self.model, self.ref_model):
            if model is not None:
                fuse_head(_base_model(self.accelerator.unwrap_model(model)), self.temperature)


class FusedGRPOTrainer(FusedHead, GRPOTrainer):
    """TRL's GRPOTrainer with our head; every `loss_type`, option and metric is unchanged."""


class FusedRLOOTrainer(FusedHead, RLOOTrainer):
    """TRL's RLOOTrainer with our head."""


def _base_model(model):
    """Return the model inside PEFT's wrapper, which TRL also patches."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model

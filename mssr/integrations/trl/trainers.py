"""TRL's own trainers, whose log-probs and entropy come from our head."""

from trl import GRPOTrainer, RLOOTrainer

from mssr.errors import UserError
from mssr.integrations.trl.fused_head import fuse_head


class FusedHead:
    """Mixin, to the left of a TRL trainer that scores by `fused_lm_head=True`: GRPOTrainer, RLOOTrainer and their heirs.

        class MyTrainer(FusedHead, MyGRPOTrainer): ...

    Changes who computes log-probs and entropies (in float32, of the scored tokens only, without the logits), for the
    policy and the frozen reference; everything else is the trainer's own. The entropy comes out of the same pass and
    costs a backward pass only where the loss depends on it.

    Raises:
        UserError: an option or a model that our head does not do; at construction, in one line.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self, GRPOTrainer | RLOOTrainer):  # others ask the head for more than log-probs and entropy
            raise UserError(f"FusedHead: {type(self).__name__} is no GRPOTrainer or RLOOTrainer; leave the mixin out")
        if getattr(self.args, "cast_lm_head_to_fp32", False):
            raise UserError(
                "cast_lm_head_to_fp32: the fused head computes in float32 from 16-bit weights anyway; set it to False, "
                "or use TRL's own trainer for a head with float32 weights"
            )
        for model in (self.model, self.ref_model):
            if model is not None:
                fuse_head(_base_model(self.accelerator.unwrap_model(model)), self.temperature)


class FusedGRPOTrainer(FusedHead, GRPOTrainer):
    """TRL's GRPOTrainer with our head: every `loss_type`, option and metric is its own."""


class FusedRLOOTrainer(FusedHead, RLOOTrainer):
    """TRL's RLOOTrainer with our head."""


def _base_model(model):
    """The model under PEFT's wrapper, which TRL patches too."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model

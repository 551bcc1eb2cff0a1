"""TRL's online trainers with our language-model head: the same objectives, options and metrics, without logits.

    from mssr.integrations.trl import FusedGRPOTrainer as GRPOTrainer      # the only change

`FusedHead` is a mixin for your own trainer. `mssr.integrations.trl.single_rollout` has MSSR's objective.
"""

from mssr.integrations.versions import require_version

require_version("trl")  # before importing TRL: an unsupported version would fail with another error

from mssr.integrations.trl.trainers import FusedGRPOTrainer, FusedHead, FusedRLOOTrainer  # noqa: E402

__all__ = ["FusedGRPOTrainer", "FusedHead", "FusedRLOOTrainer"]

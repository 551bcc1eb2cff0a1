"""TRL's online trainers with our language-model head: their objectives, options and metrics, without the logits.

    from mssr.integrations.trl import FusedGRPOTrainer as GRPOTrainer      # that is the whole change

`FusedHead` does it for a trainer of your own. `mssr.integrations.trl.single_rollout` has MSSR's objective in TRL.
"""

from mssr.integrations.versions import require_version

require_version("trl")  # before anything of it is imported: what an unsupported version lacks should not speak first

from mssr.integrations.trl.trainers import FusedGRPOTrainer, FusedHead, FusedRLOOTrainer  # noqa: E402

__all__ = ["FusedGRPOTrainer", "FusedHead", "FusedRLOOTrainer"]

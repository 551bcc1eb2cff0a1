"""Import this module for its side effect: `actor_rollout_ref.model.external_lib=mssr.integrations.verl_external_lib`.

verl imports it in every process that reads the model's configuration, before the model is built.
"""

from mssr.integrations.verl import install

print(f"verl {install()}: with use_fused_kernels=True, log-probs and entropy come from mssr_kernels", flush=True)

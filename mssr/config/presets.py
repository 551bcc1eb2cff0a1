"""Named sets of choices: `preset: paper` fills what a configuration leaves open.

`paper` is arXiv 2512.18215 as its authors ran MSSR, 3B and 7B alike. Where it differs from our defaults, and why ours do:

    algorithm.tracker.preset  theirs starts each prompt at exactly 0 or 1, and forgets by the mean KL to the reference, less
                              as drift grows; ours starts smoothed and forgets by each prompt's own drift
    algorithm.entropy_source  theirs is -p log p of the sampled token, at most 0.37; the fused head has the exact entropy
                              at no extra cost
    algorithm.old_logp        theirs recomputes the sampler's log-probs by a trainer pass; ours saves that pass
    algorithm.tis_cap         theirs does not correct for the difference between the two
    eval.temperature          theirs validates on samples at 0.6; greedy answers are less noisy

The rest is the same today, and is here so that the preset stays the paper if a default moves. What is no key stays ours: the
loss is a mean over all tokens of an update, every prompt has noise of its own, the first update has the full rate.
"""

from typing import Any

PAPER: dict[str, Any] = {
    "algorithm": {
        "name": "mssr",
        "tracker": {"preset": "reference", "n_init": 1, "rho_min": 0.875, "rho_max": 0.96},
        "entropy_alpha": 0.4,
        "entropy_kappa": 2.0,
        "entropy_source": "sampled_token",
        "clip_low": 0.2,
        "clip_high": 0.3,
        "dual_clip": 3.0,
        "kl_coef": 0.01,
        "kl_to": "reference",
        "entropy_coef": 0.0,
        "old_logp": "recompute",
        "tis_cap": None,
    },
    "data": {"max_prompt_tokens": 2048, "min_pixels": 262_144, "max_pixels": 4_194_304},
    "reward": {"format_weight": 0.0},
    "rollout": {
        "prompts_per_step": 2048,
        "responses_per_prompt": 1,
        "max_response_tokens": 4096,
        "temperature": 1.0,
        "truncated": "graded",
    },
    "model": {"train_vision": True, "lora": None},
    "train": {
        "steps": 150,
        "responses_per_update": 128,
        "optimizer": {
            "lr": 1e-6,
            "betas": [0.9, 0.999],
            "weight_decay": 0.01,
            "grad_clip": 0.5,
            "schedule": "constant",
            "warmup_updates": 0,
        },
    },
    "eval": {"every": 5, "temperature": 0.6},
}
PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER}


def with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration's values and, for keys that are not among them, those of the preset they name.

    A key that is there counts as given, null too. Values that are no preset's name are left to the validation.
    """
    name = values.get("preset", "default")
    return _filled(values, PRESETS.get(name, {}) if isinstance(name, str) else {})


def _filled(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = dict(values)
    for key, default in defaults.items():
        if not isinstance(default, dict):
            filled.setdefault(key, default)
        elif values.get(key) is None:  # missing, or a section without keys in the file
            filled[key] = _filled({}, default)
        elif isinstance(values[key], dict):
            filled[key] = _filled(values[key], default)
    return filled

"""Named sets of values: `preset: paper` sets what a configuration leaves open.

`paper` is arXiv 2512.18215 as its authors ran MSSR, for 3B and 7B. Our defaults differ from it in:

    algorithm.tracker.preset  theirs starts each prompt at exactly 0 or 1, and forgets by the mean KL to the reference, less
                              as drift grows; ours starts from a smoothed value and forgets by each prompt's own drift
    algorithm.entropy_source  theirs is -p log p of the sampled token, at most 0.37; the fused head has the exact entropy
                              at no extra cost
    algorithm.old_logp        theirs recomputes the sampler's log-probs in a trainer pass; ours saves that pass
    algorithm.tis_cap         theirs does not correct for the difference between the two
    eval.temperature          theirs validates on samples at 0.6; greedy answers are less noisy
    data.min_pixels           theirs scales small images up to 262,144 pixels, whatever the model; ours leaves both limits
    data.max_pixels           to the model's own image processor; theirs scales down to 4,194,304

All other defaults are the paper's; tests/cli/test_presets.py compares each with the published value. Differences
without a key remain: the loss is a mean over all tokens of an update, every prompt has its own noise, the first update
has the full rate.
"""

from typing import Any

PAPER: dict[str, Any] = {
    "algorithm": {
        "tracker": {"preset": "reference"},
        "entropy_source": "sampled_token",
        "old_logp": "recompute",
        "tis_cap": None,
    },
    "eval": {"temperature": 0.6},
    "data": {"min_pixels": 262_144, "max_pixels": 4_194_304},
}
PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER}


def with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration's values, completed by those of the preset that they name.

    A key that is present counts as given, even if it is null. A name that is no preset's is left to the validation.
    """
    name = values.get("preset", "default")
    return _filled(values, PRESETS.get(name, {}) if isinstance(name, str) else {})


def _filled(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = dict(values)
    for key, default in defaults.items():
        given = {} if values.get(key) is None else values[key]  # missing, or a section without keys in the file
        if not isinstance(default, dict):
            filled.setdefault(key, default)
        elif isinstance(given, dict):
            filled[key] = _filled(given, default)
    return filled

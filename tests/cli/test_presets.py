"""`preset: paper` has the published hyperparameters; the file and the command line override it."""

import pytest
import yaml

from mssr.config import Config, load_config, validate_config
from mssr.config.presets import PAPER
from mssr.errors import UserError

MINIMAL = {"run_dir": "run", "model": {"path": "m"}, "data": {"train": "t"}}

# As published for MSSR, or taken from its authors' scripts.
PUBLISHED = {
    "algorithm.name": "mssr",
    "algorithm.tracker.preset": "reference",
    "algorithm.tracker.n_init": 1,
    "algorithm.tracker.rho_min": 0.875,
    "algorithm.tracker.rho_max": 0.96,
    "algorithm.entropy_alpha": 0.4,
    "algorithm.entropy_kappa": 2.0,
    "algorithm.entropy_source": "sampled_token",
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.3,
    "algorithm.dual_clip": 3.0,
    "algorithm.kl_coef": 0.01,
    "algorithm.kl_to": "reference",
    "algorithm.entropy_coef": 0.0,
    "algorithm.old_logp": "recompute",
    "algorithm.tis_cap": None,
    "reward.function": "math",
    "rollout.prompts_per_step": 2048,
    "rollout.responses_per_prompt": 1,
    "rollout.max_response_tokens": 4096,
    "rollout.temperature": 1.0,
    "rollout.truncated": "graded",
    "data.max_prompt_tokens": 2048,
    "data.min_pixels": 262_144,
    "data.max_pixels": 4_194_304,
    "model.train_vision": True,
    "model.lora": None,
    "train.steps": 150,
    "train.responses_per_update": 128,
    "train.optimizer.lr": 1e-6,
    "train.optimizer.betas": (0.9, 0.999),
    "train.optimizer.weight_decay": 0.01,
    "train.optimizer.grad_clip": 0.5,
    "train.optimizer.schedule": "constant",
    "train.optimizer.warmup_updates": 0,
    "eval.every": 5,
    "eval.temperature": 0.6,
}
DIFFERS = {"algorithm.tracker.preset", "algorithm.entropy_source", "algorithm.old_logp", "algorithm.tis_cap"}
DIFFERS |= {"eval.temperature", "data.min_pixels", "data.max_pixels"}


@pytest.fixture
def load(tmp_path):
    def load(*overrides, **sections):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(MINIMAL | sections))
        return load_config(file, list(overrides))

    return load


def value(config: Config, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def keys(values: dict, prefix: str = "") -> set[str]:
    nested = {key: part for key, part in values.items() if isinstance(part, dict)}
    found = {prefix + key for key in values.keys() - nested.keys()}
    return found.union(*(keys(part, f"{prefix}{key}.") for key, part in nested.items()))


def test_paper_is_the_paper(load):
    config = load(preset="paper")
    assert {key: value(config, key) for key in PUBLISHED} == PUBLISHED
    assert keys(PAPER) == DIFFERS
    assert config.updates_per_step == 16


def test_what_differs_from_the_defaults_is_what_is_explained(load):
    config = load()
    assert {key for key in PUBLISHED if value(config, key) != PUBLISHED[key]} == DIFFERS
    assert config == load(preset="default")


def test_the_file_and_the_command_line_win(load):
    algorithm = {"kl_coef": 0.02, "tracker": {"preset": "default"}}
    config = load("train.optimizer.lr=1e-5", "algorithm.tis_cap=3", preset="paper", algorithm=algorithm, train=None)
    assert (config.algorithm.kl_coef, config.algorithm.tracker.preset) == (0.02, "default")
    assert (config.train.optimizer.lr, config.algorithm.tis_cap) == (1e-5, 3)
    assert config.algorithm.entropy_source == "sampled_token" and config.train.optimizer.grad_clip == 0.5


def test_null_counts_as_given(load):
    assert load("preset=paper", "algorithm.dual_clip=null").algorithm.dual_clip is None


def test_the_preset_can_be_an_override(load):
    assert load("preset=paper") == load(preset="paper")


def test_what_a_run_writes_is_the_same_configuration(load):
    """The written file sets every key, so its preset changes nothing."""
    config = load("preset=paper", "algorithm.tis_cap=2.5", "eval.temperature=0", "train.optimizer.lr=3e-6")
    written = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert written["preset"] == "paper" and validate_config(written) == config


@pytest.mark.parametrize("preset", ["papers", "[paper]", "null", "3"])
def test_no_such_preset(load, preset):
    with pytest.raises(UserError, match="preset: Input should be 'default' or 'paper'"):
        load(f"preset={preset}")


def test_a_section_that_holds_a_value_is_still_refused(load):
    with pytest.raises(UserError, match="algorithm: Input should be a valid dictionary"):
        load("preset=paper", "algorithm=3")

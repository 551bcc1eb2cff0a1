"""Loading the configuration: what is accepted, and the one-line error for each mistake."""

import pytest
import yaml

from mssr.config import load_config, yaml_1_2
from mssr.config.nearest import FOREIGN, all_keys
from mssr.config.schema import Config
from mssr.errors import UserError

MINIMAL = "run_dir: run\nmodel: {path: m}\ndata: {train: t}\n"


@pytest.mark.parametrize("value", ["1e-6", "1.0e-6", "0.000001"])
def test_floats_without_a_dot_are_floats(load, value):
    """YAML 1.1 reads 1e-6 as a string."""
    assert load(f"train.optimizer.lr={value}").train.optimizer.lr == 1e-6
    assert load(text=MINIMAL + f"train: {{optimizer: {{lr: {value}}}}}").train.optimizer.lr == 1e-6


@pytest.fixture(params=["override", "file"])
def set_key(request, load):
    """Load a config with one more key, of a section that MINIMAL does not have, from the command line or from the file."""

    def set_key(key, value):
        section, name = key.split(".")
        if request.param == "override":
            return load(f"{key}={value}")
        return load(text=MINIMAL.replace("path: m", f"path: m, {name}: {value}") if section == "model" else
                    f"{MINIMAL}{section}: {{{name}: {value}}}\n")  # fmt: skip

    return set_key


@pytest.mark.parametrize(
    "key, value, read",
    [
        ("model.liger", "on", "on"),
        ("model.liger", "off", "off"),
        ("train.keep_checkpoints", "1e3", 1000),
        ("train.keep_checkpoints", "1.0e3", 1000),
        ("train.keep_checkpoints", "1_000", 1000),
        ("train.keep_checkpoints", "010", 10),  # YAML 1.1: octal
        ("train.async_save", "no", False),
        ("train.async_save", "off", False),
        ("train.async_save", "True", True),
        ("train.checkpoint_minutes", "~", None),
        ("train.checkpoint_minutes", "+.5", 0.5),
        ("train.deepspeed", "null", None),
        ("sft.data", "2026-11-27", "2026-11-27"),  # YAML 1.1: a date
        ("sft.data", "12:30", "12:30"),  # YAML 1.1: 750
        ("sft.data", "yes", "yes"),
        ("sft.data", "'1e3'", "1e3"),
    ],
)
def test_file_and_command_line_read_values_alike(set_key, key, value, read):
    section, name = key.split(".")
    found = getattr(getattr(set_key(key, value), section), name)
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize("value", ["1.5", "1e-3", "12:30", "0x10"])
def test_what_is_no_number_of_steps_is_refused_from_both(set_key, value):
    with pytest.raises(UserError, match=r"train\.keep_checkpoints: Input should be a valid integer"):
        set_key("train.keep_checkpoints", value)


def test_a_number_for_a_text_says_to_quote_it(refused, load):
    assert "model.path: Input should be a valid string, got 1000.0; write it in quotes" in refused("model.path=1e3")
    assert load("model.path='1e3'").model.path == "1e3"


def test_a_key_twice_in_an_override(refused):
    assert "lr is there twice" in refused("train.optimizer={lr: 1, lr: 2}")


@pytest.mark.parametrize(
    "text", ["on", "1e3", "010", "08", "1_0", "2026-11-27", "12:30", "~", "", "<<", "a: b", "=", ".5"]
)
def test_a_written_config_reads_back(load, tmp_path, text):
    """`config.yaml` of a run, which YAML 1.1 (`mssr export`) and 1.2 must read as the same text."""
    written = yaml_1_2.dump(load().model_dump(mode="json") | {"eval": None}, sort_keys=False)
    assert load(text=written) == load()
    text = yaml_1_2.dump({"path": text})
    assert yaml_1_2.load(text) == yaml.safe_load(text)


def test_overrides_win_and_make_sections(load):
    text = MINIMAL + "seed: 3\ntrain:\n"  # a section without keys
    config = load(
        "seed=4", "algorithm.tracker.n_init=2", "train.optimizer.betas=[0.8, 0.9]", "data.val=null", text=text
    )
    assert (config.seed, config.algorithm.tracker.n_init, config.data.val) == (4, 2, None)
    assert config.train.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize("text", ["x = y", "Box it. # not a comment", "# Task", "it's #1"])
def test_an_override_keeps_its_equals_signs_and_hashes(load, text):
    assert load(f"data.instruction={text}").data.instruction == text
    assert load(f'data.instruction="{text}" # a comment').data.instruction == text
    assert load("train.optimizer.betas=[0.8, 0.9] # a comment").train.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    "key", ["seed", "train.steps", "train.optimizer.lr", "train.zero_stage", "sft.stop_at_accuracy"]
)
@pytest.mark.parametrize("value", ["true", "False"])
def test_a_truth_value_is_no_number(refused, key, value):
    assert refused(f"{key}={value}").endswith(f"{key}: Input should be a number, got {value.capitalize()}")


def test_a_key_with_dots_in_the_file(refused):
    said = "{key}: in a file a section is not written with a dot; write {nested}"
    for text, key, nested in (
        ("train.steps: 3\n", "train.steps", "train: {steps: ...}"),
        ("train: {optimizer.lr: 1}\n", "train.optimizer.lr", "train: {optimizer: {lr: ...}}"),
    ):
        assert refused(text=MINIMAL + text).endswith(said.format(key=key, nested=nested))


def test_a_missing_key_is_named(refused):
    assert "model.path: Field required" in refused(text="run_dir: r\nmodel: {}\ndata: {train: t}\n")


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("sead", "seed"),
        ("train.stepz", "train.steps"),
        ("algorithm.tracker.rho_mn", "algorithm.tracker.rho_min"),
        ("rollout.promts_per_step", "rollout.prompts_per_step"),
    ],
)
def test_an_unknown_key_names_the_nearest(refused, key, nearest):
    assert refused(f"{key}=1").endswith(f"unknown key {key}; did you mean {nearest}?")


@pytest.mark.parametrize(
    "key, ours",
    [
        ("lr", "train.optimizer.lr"),
        ("train.lr", "train.optimizer.lr"),
        ("train.weight_decay", "train.optimizer.weight_decay"),
        ("sft.lr", "sft.optimizer.lr"),
        ("steps", "train.steps"),
        ("trian.steps", "train.steps"),
        ("temperature", "rollout.temperature"),
        ("stepz", "train.steps"),
        ("algorithm.rho_min", "algorithm.tracker.rho_min"),
        ("lora.rank", "model.lora.rank"),
        ("train.optimizer.beta", "train.optimizer.betas"),  # and not TRL's beta
        # TRL
        ("learning_rate", "train.optimizer.lr"),
        ("train.num_generations", "rollout.responses_per_prompt"),
        ("per_device_train_batch_size", "train.responses_per_update"),
        # EasyR1, verl
        ("algorithm.adv_estimator", "algorithm.name"),
        ("worker.rollout.n", "rollout.responses_per_prompt"),
        ("worker.actor.optim.lr", "train.optimizer.lr"),
        ("data.max_response_length", "rollout.max_response_tokens"),
        ("actor_rollout_ref.actor.kl_loss_coef", "algorithm.kl_coef"),
        ("actor_rollout_ref.model.path", "model.path"),
        ("trainer.save_freq", "train.checkpoint_every"),
    ],
)
def test_an_unknown_key_goes_by_its_last_part_and_by_other_trainers_names(refused, key, ours):
    assert refused(f"{key}=1").endswith(f"unknown key {key}; did you mean {ours}?")
    section, _, rest = key.partition(".")
    if rest and section not in Config.model_fields:
        assert f"did you mean {ours}?" in refused(text=f"{MINIMAL}{section}: {{{rest}: 1}}\n")


def test_other_trainers_names_lead_to_keys_that_exist():
    keys = set(all_keys(Config))
    assert set(FOREIGN.values()) <= keys
    assert not {key.rpartition(".")[2] for key in keys} & set(FOREIGN)


def test_an_unknown_key_of_the_file_is_named_too(refused):
    assert "unknown key train.optimizer.learning_rate" in refused(
        text=MINIMAL + "train: {optimizer: {learning_rate: 1}}"
    )


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("seed=-1", "seed: Input should be greater than or equal to 0, got -1"),
        ("seed=4294967296", "seed: Input should be less than 4294967296"),
        ("train.steps=0", "train.steps: Input should be greater than 0, got 0"),
        ("train.steps=1.5", "train.steps"),
        ("train=3", "train: Input should be a valid dictionary"),
        ("train.zero_stage=4", "train.zero_stage: Input should be 0, 1, 2 or 3, got 4"),
        (
            "algorithm.name=ppo",
            "algorithm.name: Input should be 'mssr', 'mvsr', 'spo', 'grpo', 'rloo' or 'reinforce_pp', got 'ppo'",
        ),
        ("train.optimizer.lr=-1", "train.optimizer.lr"),
        ("train.optimizer.lr=.inf", "train.optimizer.lr"),
        ("train.optimizer.lr=nan", "train.optimizer.lr"),
        ("train.optimizer.betas=[0.9, 1.0]", "train.optimizer.betas.1: Input should be less than 1"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas"),
        ("algorithm.tracker.rho_min=0.99", "rho_min 0.99 is larger than rho_max 0.96"),
        ("algorithm.tracker.rho_max=1.0", "algorithm.tracker.rho_max: Input should be less than 1"),
        ("algorithm.dual_clip=1.0", "algorithm.dual_clip: Input should be greater than 1"),
        ("algorithm.tis_cap=0", "algorithm.tis_cap: Input should be greater than 0"),
        ("algorithm.entropy_kappa=0", "algorithm.entropy_kappa"),
        (
            "reward.function=3",
            "reward.function: expected a built-in's name, file.py:NAME or package.module:NAME, got 3",
        ),
        ("reward.function={}", "reward.function: is empty; name at least one function"),
        ("reward.function={a b: math}", "reward.function: 'a b' is not a label; use letters, digits, - and _"),
        ("reward.function={errors: math}", "reward.function: reward/errors is a metric of its own; give the function"),
        ("reward.function={accuracy: {pattern: x}}", "reward.function: accuracy: names no function; write {function:"),
        (
            "reward.function={accuracy: {function: math, 2: x}}",
            "reward.function: accuracy: an option is not a Python name",
        ),
        (
            "reward.function={accuracy: {function: math, timeout_s: 0}}",
            "reward.function: accuracy: timeout_s should be a number greater than 0, got 0",
        ),
        ("reward.weights={accuracy: true}", "reward.weights.accuracy: Input should be a valid number, got True"),
        ("reward.weights={accuracy: .nan}", "reward.weights.accuracy: Input should be a finite number"),
        ("reward.workers=0", "reward.workers: Input should be greater than 0, got 0"),
        ("reward.on_error=ignore", "reward.on_error: Input should be 'zero', 'skip' or 'fail'"),
        ("data.on_bad_row=ignore", "data.on_bad_row"),
        (
            "rollout.prompts_per_step=100",
            "rollout.prompts_per_step 100 is not a multiple of train.responses_per_update 128",
        ),
        ("steps", "override 'steps': expected key=value"),
        ("=3", "override '=3': expected key=value"),
        ("data.instruction=[a", "override 'data.instruction=[a': the value is not valid YAML"),
        ("run_dir.x=3", "run_dir holds a value, not a section"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(refused, override, words):
    assert words in refused(override)


def test_reward_functions_by_label(load, monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    one = load("reward.function=~/mine.py:score").reward
    assert one.functions == {"accuracy": ("/users/me/mine.py:score", None, {})} and not one.needs_answer
    several = load(
        "reward.function={accuracy: math, short: {function: a.b:short, timeout_s: 2, limit: 3}}",
        "reward.weights={short: 0.5}",
    ).reward
    assert several.functions == {"accuracy": ("math", None, {}), "short": ("a.b:short", 2, {"limit": 3})}
    assert several.needs_answer and several.success_weight == 1


@pytest.mark.parametrize(
    "function, needed",
    [
        ("math", True),
        ("{accuracy: format, length: {function: overlong, buffer: 10}}", False),
        ("{accuracy: my.py:judge, other: choice}", True),
        ("{accuracy: exact}", False),
        ("{accuracy: {function: judge, url: u, model: m}}", True),
        ("{accuracy: {function: judge, url: u, model: m, template: polite.jinja}}", False),
    ],
)
def test_which_rewards_need_an_answer(load, function, needed):
    assert load(f"reward.function={function}").reward.needs_answer is needed


def test_null_switches_optional_settings_off(load):
    config = load("algorithm.dual_clip=null", "algorithm.tis_cap=null")
    assert config.algorithm.dual_clip is None and config.algorithm.tis_cap is None


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [1", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "seed is there twice"),
        ("- 1\n", "expected `key: value`"),
        ("5", "key: value"),
    ],
)
def test_a_file_that_is_no_config(refused, text, words):
    assert words in refused(text=text)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="not a readable config file: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not a readable config file"):
        load_config(tmp_path / "binary.yaml")


SECTIONS = ["reward", "algorithm", "algorithm.tracker", "rollout", "train", "train.budget", "train.optimizer", "sft"]


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("section", [*SECTIONS, "sft.optimizer", "eval", "log"])
def test_a_section_without_keys_has_its_defaults(load, section, preset):
    """All its keys are commented out in the file, or it is null on the command line."""
    whole = load(f"preset={preset}")
    assert load(f"{section}=null", f"preset={preset}") == whole
    outer, _, inner = section.partition(".")
    text = f"{MINIMAL}preset: {preset}\n{outer}:\n" + (f"  {inner}:\n    # lr: 1\n" if inner else "  # every: 1\n")
    assert load(text=text) == whole


def test_a_required_section_without_keys_names_the_missing_key(refused):
    assert "model.path: Field required" in refused(text="run_dir: r\nmodel:\n  # path: m\ndata: {train: t}\n")


def test_a_key_of_the_warm_starts_optimizer_leaves_the_others_as_documented(load):
    default = load().sft.optimizer
    assert (default.lr, default.grad_clip, default.schedule) == (1e-5, 1.0, "cosine")
    assert load("sft.optimizer.weight_decay=0.1").sft.optimizer == default.model_copy(update={"weight_decay": 0.1})
    assert load("sft.optimizer.lr=1e-3").sft.optimizer == default.model_copy(update={"lr": 1e-3})

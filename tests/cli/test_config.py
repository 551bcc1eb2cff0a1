"""Loading the configuration: what is accepted, and the one-line error for each mistake."""

import pytest
import torch
import yaml

from mssr.algorithms.advantages import ALGORITHMS, Outcomes
from mssr.config import load_config, yaml_1_2
from mssr.config.conflicts import refuse_conflicts
from mssr.config.nearest import FOREIGN, all_keys
from mssr.config.schema import Config
from mssr.errors import UserError

MINIMAL = "run_dir: run\nmodel: {path: m}\ndata: {train: t}\n"


@pytest.fixture
def load(tmp_path):
    """Load a config file with the given text and overrides."""

    def load(*overrides, text=MINIMAL):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return load_config(file, list(overrides))

    return load


@pytest.fixture
def refused(load):
    def refused(*overrides, text=MINIMAL):
        with pytest.raises(UserError) as error:
            load(*overrides, text=text)
        (line,) = str(error.value).splitlines()
        return line

    return refused


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


def test_an_override_keeps_its_equals_signs(load):
    assert load("data.instruction=x = y").data.instruction == "x = y"


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
        ("reward.format_weight=1.5", "reward.format_weight"),
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


def test_null_switches_optional_settings_off(load):
    config = load("algorithm.dual_clip=null", "algorithm.tis_cap=null")
    assert config.algorithm.dual_clip is None and config.algorithm.tis_cap is None


def test_the_reference_preset_needs_a_kl(refused):
    assert "kl_coef" in refused("algorithm.tracker.preset=reference", "algorithm.kl_coef=0")


def test_keeping_the_best_needs_problems_to_measure_it_on(refused):
    assert "set data.val" in refused("train.keep_best=true")


def test_pixel_limits_out_of_order(refused):
    assert "min_pixels 99 is larger than max_pixels 98" in refused("data.min_pixels=99", "data.max_pixels=98")


def test_an_adapter_merged_in_16_bits_needs_its_correction(refused, load):
    line = refused("model.lora.rank=8", "model.dtype=bfloat16")
    assert "model.lora with model.dtype bfloat16" in line and "algorithm.old_logp=recompute" in line
    load("model.lora.rank=8", "model.dtype=bfloat16", "algorithm.old_logp=recompute")
    load("model.lora.rank=8", "model.dtype=float32")
    load("model.lora.rank=8", "device=cpu")


def test_what_auto_is_goes_by_the_machine(load, monkeypatch):
    """Without a GPU auto is float32, for which nothing is to be corrected."""
    config = load("model.lora.rank=8")
    with pytest.raises(ValueError, match=r"model.lora with model.dtype auto \(bfloat16 on a GPU\) samples from"):
        refuse_conflicts(config, "cuda")
    refuse_conflicts(load("model.lora.rank=8", "algorithm.old_logp=recompute"), "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="model.lora with model.dtype auto"):
        load("model.lora.rank=8")
    load("model.lora.rank=8", "device=cpu")


def test_stopping_at_an_accuracy_needs_problems_to_measure_it_on(refused):
    assert "sft.stop_at_accuracy needs" in refused("sft.stop_at_accuracy=0.5", "data.val=null")


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


CORRECTED = ("algorithm.old_logp=recompute",)
SERVERS = ("rollout.engine=servers", "rollout.servers=[http://a:8000]")


@pytest.mark.parametrize(
    "overrides, said",
    [
        (("rollout.engine=servers",), "rollout.engine servers and rollout.servers"),
        (("rollout.servers=[http://a:8000]",), "rollout.engine servers and rollout.servers"),
        (
            ("rollout.engine=servers", "rollout.servers=[http://a:80,http://a:80/]"),
            "rollout.servers: an address is listed twice",
        ),
        (("rollout.servers=[a:8000]",), "rollout.servers: expected http://host:port, got a:8000"),
        (("rollout.servers=[https://a:8000]",), "rollout.servers: expected http"),
        (("rollout.servers=[http://a]",), "rollout.servers: expected http"),
        (("rollout.servers=[http://a:port]",), "rollout.servers: expected http"),
        ((*CORRECTED, "rollout.one_step_off=true"), "set rollout.engine=servers"),
        ((*SERVERS, "rollout.one_step_off=true"), "rollout.one_step_off samples from a policy that differs"),
        ((*SERVERS, *CORRECTED, "rollout.one_step_off=true", "algorithm.tis_cap=null"), "algorithm.tis_cap"),
        (("rollout.quantization=fp8",), "rollout.quantization samples from a policy that differs"),
        ((*CORRECTED, "rollout.quantization=fp8", "rollout.engine=hf"), "set rollout.engine=vllm or servers"),
        (("rollout.offload_optimizer=true", "train.zero_stage=0"), "set train.zero_stage=1, 2 or 3"),
        (("rollout.truncated=dropped",), "'graded', 'masked' or 'failed'"),
    ],
)
def test_rollout_settings_that_do_not_go_together(refused, overrides, said):
    assert said in refused(*overrides)


def test_rollout_settings_that_do(load):
    assert load(*SERVERS, *CORRECTED, "rollout.one_step_off=true").rollout.one_step_off
    assert load(*CORRECTED, "rollout.quantization=fp8").rollout.quantization == "fp8"
    assert load("rollout.offload_optimizer=true").rollout.offload_optimizer


GROUPS = ("algorithm.name=grpo", "rollout.responses_per_prompt=8", "rollout.prompts_per_step=256")


@pytest.mark.parametrize(
    "overrides, said",
    [
        (("algorithm.name=grpo",), "set rollout.responses_per_prompt=8"),
        (("algorithm.name=rloo",), "set rollout.responses_per_prompt=8"),
        (
            (*GROUPS, "rollout.responses_per_prompt=3", "rollout.prompts_per_step=100"),
            "rollout.prompts_per_step 100 x rollout.responses_per_prompt 3 is not a multiple of "
            "train.responses_per_update 128",
        ),
        (("algorithm.dynamic_sampling=2",), "set algorithm.name=grpo or rloo"),
        (
            (*GROUPS, *SERVERS, *CORRECTED, "rollout.one_step_off=true", "algorithm.dynamic_sampling=2"),
            "a step's rewards",
        ),
        ((*GROUPS, "algorithm.prompt_sampling=prioritised"), "set algorithm.name=spo, mssr or mvsr"),
        ((*SERVERS, *CORRECTED, "rollout.one_step_off=true", "algorithm.name=spo"), "needs the last step's update"),
        (("algorithm.tracker.preset=reference", "algorithm.kl_to=text_only"), "algorithm.kl_to=reference"),
    ],
)
def test_what_an_algorithm_goes_by_must_be_there(refused, overrides, said):
    assert said in refused(*overrides)


def test_updates_of_groups_and_budgets(load):
    config = load(*GROUPS, "train.steps=10")
    assert (config.responses_per_step, config.updates_per_step, config.total_updates) == (2048, 16, 160)
    assert load(*GROUPS, "train.steps=10", "train.budget.updates=100").total_updates == 100
    assert load(*GROUPS, "train.steps=10", "train.budget.updates=999").total_updates == 160


def test_spo_prioritises_unless_told_otherwise(load):
    assert load("algorithm.name=spo").algorithm.prompt_sampling == "prioritised"
    assert load("algorithm.name=spo", "algorithm.prompt_sampling=uniform").algorithm.prompt_sampling == "uniform"
    assert load("algorithm.name=mssr").algorithm.prompt_sampling == "uniform"


@pytest.mark.parametrize(
    "overrides, loaded",
    [
        ((), True),
        (("algorithm.kl_coef=0",), False),
        (("algorithm.kl_to=text_only",), False),
        (("model.lora.rank=8", "device=cpu"), False),
    ],
)
def test_what_loads_a_frozen_reference(load, overrides, loaded):
    assert load(*overrides).loads_reference == loaded


@pytest.mark.parametrize(
    "overrides, rescored",
    [
        ((), True),
        (("algorithm.tracker.drift=batch",), False),
        (("algorithm.tracker.preset=reference",), False),
        (GROUPS, False),
        (("algorithm.name=reinforce_pp",), False),
        (("algorithm.name=spo",), True),
    ],
)
def test_what_rescores_previous_responses(load, overrides, rescored):
    assert load(*overrides).algorithm.rescores_responses == rescored


@pytest.mark.parametrize("name", ["mssr", "mvsr", "spo", "grpo", "rloo", "reinforce_pp"])
def test_the_table_says_which_algorithms_need_a_tracker_or_groups(load, name):
    load(f"algorithm.name={name}", *GROUPS[1:])
    algorithm = ALGORITHMS[name]
    assert algorithm.tracked == (name in ("mssr", "mvsr", "spo"))
    one_response_each = Outcomes(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([3, 4]), group=1)
    if algorithm.grouped:
        with pytest.raises(ValueError, match="groups of 1"):
            algorithm.advantages(one_response_each)
    else:
        assert algorithm.advantages(one_response_each).isfinite().all()


@pytest.mark.parametrize("name", ["[a]", "{a: 1}", "ppo"])
def test_a_name_that_is_no_algorithm_is_one_line(load, name):
    with pytest.raises(UserError, match="algorithm.name: Input should be 'mssr'"):
        load(f"algorithm.name={name}")


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

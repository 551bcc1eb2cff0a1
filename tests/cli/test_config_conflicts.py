"""Settings that exclude each other, and what a setting implies: the one-line error, or what is loaded."""

import pytest
import torch

from mssr.algorithms.advantages import ALGORITHMS, Outcomes
from mssr.config.conflicts import refuse_conflicts
from mssr.errors import UserError


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
        (("rollout.top_p=0.9",), "rollout.top_p 0.9 samples from a policy that differs from the trained one: set"),
        (("rollout.top_k=50",), "rollout.top_k 50 samples from a policy that differs from the trained one: set"),
        ((*CORRECTED, "rollout.top_k=50", "algorithm.tis_cap=null"), "algorithm.tis_cap, which correct for it"),
        (("rollout.top_p=0",), "rollout.top_p: Input should be greater than 0"),
        (("rollout.top_k=-1",), "rollout.top_k: Input should be greater than or equal to 0"),
        (("rollout.stop=['']",), "rollout.stop: expected texts with at least one character"),
        (("eval.samples=4",), "eval.samples 4 needs random samples, and eval.temperature 0 is greedy: set"),
        (("eval.top_p=0.9",), "eval.top_p 0.9 needs random samples"),
        (("eval.top_k=20",), "eval.top_k 20 needs random samples"),
    ],
)
def test_rollout_settings_that_do_not_go_together(refused, overrides, said):
    assert said in refused(*overrides)


def test_rollout_settings_that_do(load):
    assert load(*SERVERS, *CORRECTED, "rollout.one_step_off=true").rollout.one_step_off
    assert load(*CORRECTED, "rollout.quantization=fp8").rollout.quantization == "fp8"
    assert load("rollout.offload_optimizer=true").rollout.offload_optimizer
    assert load(*CORRECTED, "rollout.top_p=0.9", "rollout.top_k=50").rollout.cuts_distribution
    assert not load("rollout.top_p=1", "rollout.top_k=0", "eval.top_p=1", "eval.top_k=0").rollout.cuts_distribution
    assert load("eval.temperature=0.6", "eval.samples=4", "eval.top_p=0.95", "eval.top_k=20").eval.samples == 4
    assert load("rollout.stop=['</answer>']").rollout.stop == ["</answer>"]


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
    reward, graded = torch.tensor([0.0, 1.0]), torch.tensor([True, True])
    one_response_each = Outcomes(reward, reward, graded, torch.tensor([0.5, 0.5]), torch.tensor([3, 4]), group=1)
    if algorithm.grouped:
        with pytest.raises(ValueError, match="groups of 1"):
            algorithm.advantages(one_response_each)
    else:
        assert algorithm.advantages(one_response_each).isfinite().all()


@pytest.mark.parametrize("name", ["[a]", "{a: 1}", "ppo"])
def test_a_name_that_is_no_algorithm_is_one_line(load, name):
    with pytest.raises(UserError, match="algorithm.name: Input should be 'mssr'"):
        load(f"algorithm.name={name}")

"""Both rollout engines sample from a policy with its adapters, and vLLM loads an exported model."""

import warnings

import torch
from option_helpers import LORA, disturb, make_engine_with, options
from policy_helpers import processors, random_batch
from rollout_engines import ENDS, LIMIT, hf

from mssr.config.schema import RolloutConfig
from mssr.policy.export import save_model
from mssr.policy.loss import CrossEntropy
from mssr.rollout.base import Response, Sampling, collect
from mssr.rollout.hf import HFRollout
from mssr.rollout.vllm.requests import engine_input, sampling_params
from mssr.rollout.weight_sync import sync_weights

ALIVE = []  # never garbage-collected: a vLLM engine would destroy the process group that all tests share
STREAMS = list(range(6))
NEAR = 1e-4  # nats


def largest_gap(engine, batch) -> float:
    return float((engine.score(batch) - batch.logp)[batch.mask].abs().max())


def test_hf_samples_with_the_adapters(world, prompts):
    engine = make_engine_with(options(lora=LORA))
    rollout = hf(engine.policy)
    rollout.update_weights(engine.policy, 0)
    disturb(engine.policy)
    batch = rollout.generate(prompts, STREAMS, 1.0)
    assert largest_gap(engine, batch) < NEAR
    start = make_engine_with(options())
    assert largest_gap(start, batch) > 100 * NEAR


def sample_from_shares(world, prompts):
    engine = make_engine_with(options(lora=LORA), zero_stage=3, world=world)
    config = RolloutConfig(max_response_tokens=LIMIT)
    rollout = HFRollout(config, engine.policy, ENDS, processors()[0].pad_token_id, world.device)
    gaps = []
    for version in range(2):
        engine.update(random_batch(prompts, [5, 9, 3, 7, 1, 12], seed=version), CrossEntropy())
        rollout.update_weights(engine.policy, version)
        gaps.append(largest_gap(engine, rollout.generate(prompts, STREAMS, 1.0)))
    return gaps


def test_hf_on_a_whole_copy(ranks, prompts):
    assert max(sum(ranks(sample_from_shares, prompts), [])) < NEAR


def start_vllm(path):
    """Start vLLM on a directory as a user would, but with our settings for log-probs and pixels."""
    from vllm import LLM

    with warnings.catch_warnings(action="ignore"):
        llm = LLM(
            model=str(path), dtype="float32", max_model_len=128, max_num_seqs=8, enforce_eager=True,
            distributed_executor_backend="external_launcher",  # in this process, which already has a process group of one
            logprobs_mode="processed_logprobs", generation_config="vllm", enable_prefix_caching=False,
            mm_processor_cache_gb=0, limit_mm_per_prompt={"video": 0}, disable_log_stats=True, mm_device_do_normalize=False,
        )  # fmt: skip
    ALIVE.append(llm)
    return llm


def sample(llm, policy, prompts):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    settings = SamplingParams(
        **sampling_params(Sampling(1.0), LIMIT, ENDS, policy.forbidden_token_ids),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    for number, prompt in enumerate(prompts):
        inputs = engine_input(prompt, policy.image_token_id, policy.merge_size)
        llm.llm_engine.add_request(str(number), inputs, settings)
    responses = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                (one,) = output.outputs
                logps = [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)]
                responses[int(output.request_id)] = Response(
                    torch.tensor(one.token_ids), torch.tensor(logps), one.finish_reason == "length", 0
                )
    return collect(list(prompts), [responses[number] for number in range(len(prompts))], 0)


def test_vllm_reads_an_export_and_takes_the_merged_weights(world, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = make_engine_with(options(lora=LORA))
    engine.update(random_batch(prompts, [5, 9, 3, 7, 1, 12]), CrossEntropy())
    start = make_engine_with(options())
    llm = start_vllm(save_model(engine.policy, processors(), tmp_path / "model", world))
    batch = sample(llm, engine.policy, prompts)
    assert largest_gap(engine, batch) < NEAR < 100 * NEAR < largest_gap(start, batch)

    engine.update(random_batch(prompts, [5, 9, 3, 7, 1, 12], seed=1), CrossEntropy())
    assert largest_gap(engine, sample(llm, engine.policy, prompts)) > 10 * NEAR
    sync_weights(llm, engine.policy, bucket_bytes=1 << 20)
    assert largest_gap(engine, sample(llm, engine.policy, prompts)) < NEAR

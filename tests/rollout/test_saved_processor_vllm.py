"""vLLM on a saved model, through its own processor, reads images as the run did."""

import warnings

import pytest
import torch
from family_helpers import VISION, family_distribution, family_plain
from saved_model import CHAT, SIZES, picture, prompt_of, saved_model

ALIVE = []  # never garbage-collected: a vLLM engine would destroy the process group that all tests share


def start_vllm(folder):
    """Start vLLM as a user would, but in this process, which already has a process group of one."""
    from vllm import LLM

    with warnings.catch_warnings(action="ignore"):
        llm = LLM(
            model=str(folder), dtype="float32", max_model_len=256, max_num_seqs=4, enforce_eager=True,
            distributed_executor_backend="external_launcher", generation_config="vllm", limit_mm_per_prompt={"video": 0},
        )  # fmt: skip
    ALIVE.append(llm)
    return llm


@pytest.mark.slow("15 to 20 s each; plain transformers' own processor is in tests/policy/test_saved_processor.py")
@pytest.mark.parametrize("family", VISION)
def test_vllm_reads_images_as_the_run_did(world, family, tmp_path, monkeypatch):
    from vllm import SamplingParams

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    encoder, folder = saved_model(family, tmp_path)
    text = encoder.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    requests = [{"prompt": text, "multi_modal_data": {"image": picture(size)}} for size in SIZES]
    outputs = start_vllm(folder).generate(requests, SamplingParams(temperature=0.0, max_tokens=1, logprobs=0))
    plain = family_plain(folder)
    for size, output in zip(SIZES, outputs, strict=True):
        prompt = prompt_of(encoder, picture(size))
        assert output.prompt_token_ids == prompt.token_ids.tolist()
        (answer,) = output.outputs
        (token,) = answer.token_ids
        with torch.no_grad():
            expected = family_distribution(plain, prompt, torch.tensor([token]))[0, token]
        assert abs(answer.logprobs[0][token].logprob - float(expected)) < 1e-2

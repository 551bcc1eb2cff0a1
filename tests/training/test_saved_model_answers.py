"""Who loads `run_dir/model` with its own processor gets the run's answers: plain transformers, and vLLM."""

import io
import os
import pickle
import subprocess
import sys

import pyarrow.parquet
import pytest
from material import INSTRUCTION
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mssr.data.files import open_rows
from mssr.rewards.builtin.math import math
from mssr.rewards.row import Row

TOKENS = 12  # the longest response of the run
VLLM = """
import pickle, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, tokens, requests = pickle.load(sys.stdin.buffer)
    llm = LLM(model=folder, dtype="float32", max_model_len=256, enforce_eager=True, limit_mm_per_prompt={"video": 0})
    outputs = llm.generate(requests, SamplingParams(temperature=0.0, max_tokens=tokens), use_tqdm=False)
    with open(sys.argv[1], "wb") as file:
        pickle.dump([list(output.outputs[0].token_ids) for output in outputs], file)
"""


@pytest.mark.slow("40 s: a run of its own, whose images its limit makes smaller, and a vLLM of its own")
def test_the_folders_own_processor_gives_the_runs_answers(mssr, warm, run, tmp_path):
    """The images have 16 times the pixels of the run's limit."""
    rows = list(open_rows(str(warm.parent / "data" / "val.parquet")))
    for row in rows:
        picture = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        assert picture.width * picture.height == 6272
        row["images"] = [picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST)]
    large = [row | {"images": [{"bytes": as_png(row["images"][0])}]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(large), tmp_path / "large.parquet")
    settings = [f"data.val={tmp_path / 'large.parquet'}", "data.max_pixels=6272", "train.steps=1"]
    mssr("train", warm, run.override, *settings).check()
    last, folder = run.metrics[-1], run.path / "model"

    processor = AutoProcessor.from_pretrained(folder)
    texts = [prompt(processor, row["problem"]) for row in rows]
    pictures = [row["images"][0] for row in rows]
    by_vllm = answers_of_vllm(folder, texts, pictures, tmp_path)
    assert by_vllm == answers_of_transformers(folder, processor, texts, pictures)
    decoded = [processor.decode(answer, skip_special_tokens=True) for answer in by_vllm]
    right = [math(text, Row(row["problem"], row["answer"])) for row, text in zip(rows, decoded, strict=True)]
    assert sum(right) / len(rows) == last["val/accuracy"]
    assert sum(map(len, by_vllm)) / len(rows) == last["val/response_tokens"]


def prompt(processor, problem):
    question = f"{problem.removeprefix('<image>')}\n{INSTRUCTION}"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(chat, add_generation_prompt=True)


def answers_of_transformers(folder, processor, texts, pictures):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    answers = []
    for text, picture in zip(texts, pictures, strict=True):
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        whole = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0]
        answers.append(whole[inputs["input_ids"].shape[1] :].tolist())
    return answers


def answers_of_vllm(folder, texts, pictures, tmp_path):
    """In a process of its own, as a user would start it."""
    requests = [
        {"prompt": text, "multi_modal_data": {"image": picture}} for text, picture in zip(texts, pictures, strict=True)
    ]
    (tmp_path / "vllm_answers.py").write_text(VLLM)
    done = subprocess.run(
        [sys.executable, tmp_path / "vllm_answers.py", tmp_path / "answers.pickle"],
        input=pickle.dumps((str(folder), TOKENS, requests)),
        capture_output=True,
        timeout=300,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads((tmp_path / "answers.pickle").read_bytes())


def as_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()

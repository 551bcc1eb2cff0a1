"""Rows with the schemas of verl, TRL, OpenAI and ShareGPT, written by the `datasets` library, give the right prompts."""

import base64
import json

import datasets
import pytest
from datasets import Features, Image, List, Value

from mssr.data.columns import renamed
from mssr.data.prompts import PromptEncoder, Unusable
from mssr.errors import UserError

MESSAGE = {"role": Value("string"), "content": Value("string")}
# What verl's examples/data_preprocess write.
VERL = Features(
    {
        "data_source": Value("string"),
        "prompt": List(MESSAGE),
        "images": List(Image()),
        "ability": Value("string"),
        "reward_model": {"style": Value("string"), "ground_truth": Value("string")},
        "extra_info": {"split": Value("string"), "index": Value("int64"), "answer": Value("string")},
    }
)
# TRL's "conversational prompt-only" with pictures beside the messages, and inside their parts.
TRL = Features({"prompt": List(MESSAGE), "image": Image(), "answer": Value("string")})
PART = {"type": Value("string"), "text": Value("string"), "image": Image()}
TRL_PARTS = Features(
    {
        "prompt": List({"role": Value("string"), "content": List(PART)}),
        "answer": Value("string"),
        "level": Value("int64"),
    }
)


def pads(count: int) -> str:
    return f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"


def user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n"


def text_of(prompt, tokenizer) -> str:
    """Return the tokens as text, without the beginning of the answer."""
    return tokenizer.decode(prompt.token_ids).removesuffix("<|im_start|>assistant\n")


@pytest.fixture
def prompt_of(make_encoder, tokenizer):
    """Return the text of a row's prompt: `prompt_of(row, **keys)`, by default with data.instruction null."""

    def make(row, **keys):
        encoder = make_encoder(**{"instruction": None} | keys)
        return text_of(encoder.encode(renamed({"answer": "1"} | row, {}), 0, "s"), tokenizer)

    return make


def refusal(make_encoder, row) -> str:
    with pytest.raises(Unusable) as caught:
        make_encoder().check(renamed({"answer": "1"} | row, {}))
    return str(caught.value)


def saved(folder, features, rows):
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def test_verl(make_dataset, tokenizer, png, tmp_path, capsys):
    rows = [
        {
            "data_source": "geo3k",
            "prompt": [{"role": "user", "content": text}],
            "images": [{"bytes": png(28, 28, seed=seed)} for seed in range(images)],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": "train", "index": 4, "answer": answer},
        }
        for text, images, answer in [("<image>Find x. Box it!", 1, "48"), ("1 + 1? Box it!", 0, "2")]
    ]
    file = saved(tmp_path, VERL, rows)
    first, second = make_dataset(file, instruction=None)
    assert text_of(first, tokenizer) == user(pads(1) + "Find x. Box it!") and first.images == (png(28, 28),)
    assert text_of(second, tokenizer) == user("1 + 1? Box it!") and second.images == ()
    assert (first.problem, first.answer, second.answer) == ("<image>Find x. Box it!", "48", "2")
    kept = {name: rows[0][name] for name in ("data_source", "ability", "reward_model", "extra_info")}
    assert first.columns == kept and list(first.columns) == list(kept)
    told, note = capsys.readouterr().err.splitlines()[-2:]  # after the progress of `datasets`
    assert told.endswith("for the reward: data_source, ability, reward_model, extra_info")
    assert note.endswith(
        "2 of 2 prompts are conversations, to which nothing is added; to append a text set data.instruction"
    )


def test_trl_with_a_picture_beside_the_messages(make_dataset, tokenizer, png, tmp_path):
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is it?"}]
    rows = [{"prompt": messages, "image": {"bytes": png(56, 28)}, "answer": "a"}]
    (prompt,) = make_dataset(saved(tmp_path, TRL, rows), instruction=None)
    assert text_of(prompt, tokenizer) == "<|im_start|>system\nThink.<|im_end|>\n" + user(pads(2) + "What is it?")
    assert (prompt.problem, prompt.answer) == ("What is it?", "a")


def test_trl_with_pictures_in_the_parts(make_dataset, tokenizer, png, tmp_path):
    def part(text=None, image=None):
        return {"type": "text" if text else "image", "text": text, "image": image and {"bytes": image, "path": None}}

    content = [part("Is "), part(image=png(28, 28)), part(" in "), part(image=png(56, 28)), part("?")]
    rows = [{"prompt": [{"role": "user", "content": content}], "answer": "no", "level": 3}]
    (prompt,) = make_dataset(saved(tmp_path, TRL_PARTS, rows))
    assert text_of(prompt, tokenizer) == user(f"Is {pads(1)} in {pads(2)}?\nBox it.")
    assert prompt.images == (png(28, 28), png(56, 28)) and prompt.columns == {"level": 3}


@pytest.mark.parametrize("form", ["path", "dict", "url", "base64"])
def test_pictures_in_parts_of_json_lines(make_dataset, png, tmp_path, form, monkeypatch):
    (tmp_path / "a.png").write_bytes(png())
    encoded = base64.b64encode(png()).decode()
    part = {
        "path": {"type": "image", "image": "a.png"},
        "dict": {"type": "image", "path": "a.png"},
        "url": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        "base64": {"type": "image", "base64": encoded},
    }[form]
    row = {"prompt": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}], "answer": "1"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert make_dataset(tmp_path / "a.jsonl")[0].images == (png(),)


def test_messages_end_with_the_solution(make_encoder, make_dataset, tokenizer, tmp_path):
    turns = [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "And 1?"), ("assistant", "3")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    prompt = make_encoder().without_answers().encode(renamed(row, {}), 0, "s")
    assert (prompt.solution, prompt.problem, prompt.answer) == ("3", "And 1?", "")
    assert text_of(prompt, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + user("1 + 1?") + "<|im_start|>assistant\n2<|im_end|>\n"
        + user("And 1?\nBox it.")
    )  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="no column `answer`"):
        make_dataset(tmp_path / "a.jsonl")


def test_a_completion_is_the_solution(make_encoder):
    for completion in ([{"role": "assistant", "content": "Blue."}], "Blue."):
        row = {"prompt": [{"role": "user", "content": "?"}], "completion": completion, "answer": "blue"}
        assert make_encoder().encode(renamed(row, {}), 0, "s").solution == "Blue."


def test_sharegpt(make_encoder, tokenizer, png):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    row = {"conversations": turns, "image": png(28, 28), "system": "You see.", "answer": "cat"}
    prompt = make_encoder(instruction="").encode(renamed(row, {}), 0, "s")
    assert text_of(prompt, tokenizer) == "<|im_start|>system\nYou see.<|im_end|>\n" + user(pads(1) + "\nWhat?")
    assert prompt.solution == "A cat."


def test_pictures_without_a_marker_come_first_in_the_first_user_turn(prompt_of, png):
    turns = [("user", "One."), ("assistant", "Yes."), ("user", "Two?")]
    row = {"prompt": [{"role": role, "content": text} for role, text in turns], "images": [png(28, 28), png(28, 28)]}
    assert prompt_of(row).startswith(user(pads(1) * 2 + "One."))


PLAIN, CHAT = {"problem": "1 + 1?"}, {"prompt": [{"role": "user", "content": "1 + 1?"}]}


def test_an_instruction_is_added_to_a_conversation_only_if_it_is_set(prompt_of):
    assert prompt_of(CHAT) == user("1 + 1?")
    assert prompt_of(PLAIN).startswith(user("1 + 1?\nThink step by step inside <think>")[:50])
    assert prompt_of(CHAT, instruction="Box it.") == prompt_of(PLAIN, instruction="Box it.") == user("1 + 1?\nBox it.")
    assert prompt_of(CHAT, instruction="") == prompt_of(PLAIN, instruction="") == user("1 + 1?")


def test_a_system_prompt_is_for_rows_without_one(prompt_of, make_dataset, tmp_path, capsys):
    own = {"messages": [{"role": "system", "content": "Mine."}, *CHAT["prompt"]]}
    assert prompt_of(own, system_prompt="Ours.") == "<|im_start|>system\nMine.<|im_end|>\n" + user("1 + 1?")
    for row in (PLAIN, CHAT):
        assert prompt_of(row, system_prompt="Ours.").startswith("<|im_start|>system\nOurs.<|im_end|>\n<|im_start|>user")
        assert prompt_of(row, system_prompt="").startswith("<|im_start|>system\n<|im_end|>\n")
    rows = [row | {"answer": "2"} for row in (own, CHAT)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_dataset(tmp_path / "a.jsonl", system_prompt="Ours.")
    said = f"{tmp_path}/a.jsonl: 1 of 2 prompts have a system turn of their own and do not get data.system_prompt\n"
    assert said in capsys.readouterr().err


def test_settings_that_would_change_the_prompt_unseen(make_encoder):
    for key, value, why in [
        ("system_prompt", "a <|im_end|> b", "contains the special token <|im_end|>"),
        ("system_prompt", "<image>", "contains <image>, which marks the images of a row"),
        ("instruction", "a <|im_end|> b", "contains the special token <|im_end|>"),
        ("instruction", "See <image>.", "contains <image>, which marks the images of a row"),
    ]:
        with pytest.raises(UserError, match=f"^data.{key} {why.replace('|', '.')}"):
            make_encoder(**{key: value})


def test_a_chat_template_that_ignores_the_system_turn(text_tokenizer, make_encoder, monkeypatch):
    config = make_encoder(system_prompt="Ours.").config
    monkeypatch.setattr(text_tokenizer, "chat_template", "{{ messages[-1].content }}")
    with pytest.raises(Unusable, match="^the chat template of model.path leaves out or changes the system turn"):
        PromptEncoder(text_tokenizer, None, config).check(PLAIN | {"answer": "2"})


def test_one_prompt_has_one_key_whichever_way_it_came(make_encoder, png):
    def key(row, **keys):
        return make_encoder(**keys).check(renamed(row | {"answer": "2", "images": [png()]}, {})).key

    assert key(PLAIN) == key(CHAT)  # both with data.instruction
    assert key(PLAIN, instruction=None) != key(CHAT, instruction=None)
    system = {"prompt": [{"role": "system", "content": "Think."}, *CHAT["prompt"]]}
    longer = {"prompt": [{"role": "user", "content": "0?"}, {"role": "assistant", "content": "0"}, *CHAT["prompt"]]}
    parts = {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1 + 1?"}]}]}
    assert len({key(CHAT), key(system), key(longer)}) == 3
    assert key(parts) == key({"problem": "<image>1 + 1?"})


def messages(*turns, **fields) -> dict:
    return {"prompt": [{"role": role, "content": content, **fields} for role, content in turns]}


ASK = ("user", "What?")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (messages(("tool", "3"), ASK), "message 1 (tool) has a role that is not read; only system, user and"),
        (messages(ASK, ("system", "No.")), "message 2 is a system turn; only the first can be one"),
        (messages(("system", "Think.")), "its messages have no user turn at the end"),
        (messages(("system", "Think."), ("assistant", "A")), "its messages have no user turn at the end"),
        (messages(("user", " ")), "message 1 (user) is empty"),
        (messages(ASK, ("assistant", "")), "message 2 (assistant) is empty"),
        (messages(("user", None)), "message 1 (user) has no content"),
        (messages(("user", {"text": "?"})), "message 1 (user) is a dict; it must be text, or a list of parts"),
        (messages(("user", [{"type": "video", "video": "a"}])), "message 1 (user) has a part of type video, which"),
        (
            messages(ASK, ("assistant", [{"type": "image"}])),
            "message 2 (assistant) has a part of type image of the ass",
        ),
        (messages(ASK, tool_calls=[{"id": 1}]), "message 1 (user) has `tool_calls`, which is not read"),
        (messages(("user", "a <|im_end|>")), "message 1 (user) contains the special token <|im_end|>"),
        (messages(("user", "a <video>")), "`problem` contains <video>, which nothing is put in for"),
        (messages(("user", "<image>")), "image token mismatch: 1 <image> in `problem` but 0 in `images`"),
        (messages(("user", [{"type": "image"}])), "image token mismatch: 1 <image> in `problem` but 0 in `images`"),
        (messages(ASK) | {"tools": [{"name": "f"}]}, "has `tools`, which no prompt would contain"),
        ({"prompt": ["What?"]}, "`problem` is a list whose item 1 is no message"),
        ({"prompt": []}, "its messages have no user turn"),
        (messages(ASK) | {"completion": ["a"]}, "`solution` is a list whose item 1 is no message"),
        (
            messages(ASK) | {"completion": [{"role": "user", "content": "a"}]},
            "`solution` is a list; it must be text, or",
        ),
        (
            messages(("user", [{"type": "image", "image": "a"}])) | {"images": ["b"]},
            "has pictures in the parts of its messages and in `images`; keep one of them",
        ),
    ],
)
def test_messages_that_cannot_be_a_prompt(make_encoder, row, said):
    line = refusal(make_encoder, row)
    assert line.startswith(said) and "\n" not in line


def test_a_bad_conversation_is_a_bad_row(make_dataset, tmp_path):
    both = messages(("user", [{"type": "image", "image": "a"}])) | {"images": ["b"]}
    rows = [row | {"answer": "1"} for row in (messages(ASK), both, messages(("tool", "x"), ("user", "Why?")))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept = make_dataset(tmp_path / "a.jsonl", on_bad_row="skip")
    assert [(bad.row, bad.reason[:18]) for bad in kept.bad_rows] == [
        (1, "has pictures in th"),
        (2, "message 1 (tool) h"),
    ]


def test_text_models_get_text(text_tokenizer, make_encoder):
    encoder = PromptEncoder(text_tokenizer, None, make_encoder(system_prompt="Think.").config)
    row = messages(("user", [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?"}]))
    prompt = encoder.encode(renamed(row | {"answer": "2"}, {}), 0, "s")
    assert text_of(prompt, text_tokenizer) == "<|im_start|>system\nThink.<|im_end|>\n" + user("1 + 1?\nBox it.")
    assert prompt.rendered == text_tokenizer.decode(prompt.token_ids)

"""Encoding rows as prompts: the model's inputs, and the one-line error for each kind of bad row."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mssr.config.data_keys import DataConfig
from mssr.data.images import decode_image
from mssr.data.prompts import PromptEncoder, Unusable, load_processors
from mssr.errors import BadRow, UserError


def refusal(encoder, row) -> str:
    with pytest.raises(BadRow) as caught:
        encoder.encode(row, 7, "train.parquet")
    line = str(caught.value)
    assert line.startswith("train.parquet, row 7: ") and "\n" not in line
    assert caught.value.row == 7
    return line.removeprefix("train.parquet, row 7: ")


def row(image=None, **columns):
    return {"images": [] if image is None else [image], "problem": "How many?", "answer": "3"} | columns


def test_prompt_is_image_question_instruction_in_the_chat_template(make_encoder, tokenizer, png):
    prompt = make_encoder().encode(row(png(56, 28)), 0, "s")
    assert tokenizer.decode(prompt.token_ids) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>How many?\nBox it.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt.token_ids.dtype == torch.int64
    assert (prompt.problem, prompt.answer, prompt.solution, prompt.row) == ("How many?", "3", None, 0)
    assert prompt.images == (png(56, 28),)


def test_markers_place_the_images(make_encoder, tokenizer, png):
    columns = {"images": [png(28, 28), png(56, 28)], "problem": "Is <image> in <image>?", "answer": 1}
    text = tokenizer.decode(make_encoder(instruction="").encode(columns, 0, "s").token_ids)
    one, two = (f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (1, 2))
    assert f"user\nIs {one} in {two}?<|im_end|>" in text


@pytest.mark.parametrize(("width", "height"), [(56, 56), (112, 56), (500, 333), (31, 640), (1, 3), (1200, 900)])
def test_image_tokens_and_pixels_are_the_processors_own(make_encoder, image_processor, tokenizer, png, width, height):
    data = png(width, height)
    prompt = make_encoder().encode(row(data), 0, "s")
    own = image_processor(
        [Image.open(io.BytesIO(data))], size={"shortest_edge": 784, "longest_edge": 100_352}, return_tensors="pt"
    )
    assert torch.equal(prompt.pixel_values, own["pixel_values"])
    assert torch.equal(prompt.image_grid_thw, own["image_grid_thw"])
    pads = int((prompt.token_ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum())
    assert pads == int(own["image_grid_thw"].prod()) // 4
    assert prompt.pixel_values.dtype == torch.float32 and prompt.pixel_values.shape == (4 * pads, 1176)


def test_pixel_limits_scale_images_up_and_down(make_encoder, png):
    small = make_encoder(min_pixels=12_544, max_pixels=50_176).encode(row(png(28, 28)), 0, "s")
    large = make_encoder(min_pixels=784, max_pixels=50_176).encode(row(png(900, 900)), 0, "s")
    assert small.image_grid_thw.tolist() == [[1, 8, 8]]  # 112 x 112 = 12,544 pixels
    assert large.image_grid_thw.tolist() == [[1, 16, 16]]  # 224 x 224 = 50,176 pixels


def test_images_may_be_bytes_dicts_or_paths(make_encoder, png, tmp_path):
    data = png()
    file = tmp_path / "a.png"
    file.write_bytes(data)
    encoder = make_encoder()
    forms = [data, {"bytes": data, "path": None}, {"bytes": None, "path": str(file)}, str(file)]
    prompts = [encoder.encode(row(form), 0, "s") for form in forms]
    assert len({prompt.key for prompt in prompts}) == 1 and all(prompt.images == (data,) for prompt in prompts)


def test_rows_without_images_are_text_only(make_encoder):
    for columns in ({"problem": "1+1?", "answer": 2}, {"problem": "1+1?", "answer": 2, "images": None}):
        prompt = make_encoder().encode(columns, 0, "s")
        assert prompt.pixel_values is None and prompt.image_grid_thw is None and prompt.images == ()
        assert prompt.answer == "2"


def test_key_is_of_the_content_not_of_the_row(make_encoder, png):
    encoder = make_encoder()
    key = encoder.encode(row(png()), 0, "a").key
    assert key == make_encoder(max_pixels=784).encode(row(png(), answer="9"), 5, "b").key
    assert key != encoder.encode(row(png(), problem="How many ?"), 0, "a").key
    assert key != encoder.encode(row(png(seed=1)), 0, "a").key
    assert key != encoder.encode(row(), 0, "a").key


def test_transparency_is_white(make_encoder):
    buffer = io.BytesIO()
    Image.new("RGBA", (56, 56), (0, 0, 0, 0)).save(buffer, format="PNG")
    assert np.asarray(decode_image(buffer.getvalue())).min() == 255


def test_photographs_are_turned_upright():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    Image.new("RGB", (40, 20)).save(buffer, format="JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (20, 40)


@pytest.mark.parametrize(
    ("answer", "text"),
    [(1e-05, "0.00001"), (1e22, "10000000000000000000000"), (0.1, "0.1"), (5.0, "5.0"), (True, "True")],
)
def test_numbers_are_written_as_a_person_writes_them(make_encoder, answer, text):
    assert make_encoder().encode(row(answer=answer), 0, "b").answer == text


@pytest.mark.parametrize("column", ["problem", "answer"])
@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_missing_text(make_encoder, column, value):
    assert refusal(make_encoder(), row(**{column: value})) == (
        f"`{column}` is missing or empty; fill it in or remove the row"
    )


def test_text_of_the_wrong_type(make_encoder):
    assert refusal(make_encoder(), row(solution={"a": 1})) == "`solution` is a dict; it must be text or a number"
    assert refusal(make_encoder(), row(answer=[b"3"])).startswith(
        "`answer` cannot be written as JSON: Object of type b"
    )


@pytest.mark.parametrize("answer", [["3"], [], {"box": [1, 2.5], "name": "Ä"}, [[0.1, None]]])
def test_an_answer_of_several_parts_is_json(make_encoder, answer):
    text = make_encoder().encode(row(answer=answer), 0, "s").answer
    assert json.loads(text) == answer and "\\u" not in text


def test_an_answer_that_no_reward_needs(make_encoder):
    encoder = make_encoder().without_answers()
    assert [encoder.encode(row(answer=empty), 0, "s").answer for empty in (None, "", 7)] == ["", "", "7"]
    assert refusal(make_encoder(), row(answer=None)).startswith("`answer` is missing or empty")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_end|>"])
@pytest.mark.parametrize("column", ["problem", "solution"])
def test_special_tokens_in_text(make_encoder, column, token):
    line = refusal(make_encoder(), row(**{column: f"a {token} b"}))
    assert line == f"`{column}` contains the special token {token}; remove it (images are marked <image>)"


def test_unreadable_images_are_named(make_encoder, png, tmp_path):
    encoder = make_encoder()
    cut = png()[:-200]
    two = {"images": [png(), {"bytes": cut, "path": "cut.png"}], "problem": "?", "answer": "1"}
    assert refusal(encoder, two).startswith("image 2 of 2 (cut.png) is unreadable: ")
    assert refusal(encoder, row(str(tmp_path / "no.png"))) == (
        f"image 1 of 1 ({tmp_path}/no.png) is unreadable: No such file or directory; replace the file or remove the row"
    )
    assert "cannot identify image file" in refusal(encoder, row(b"not an image"))
    assert "image 1 of 1 is unreadable: has neither bytes nor a path" in refusal(
        encoder, row({"bytes": None, "path": None})
    )
    assert "is a int, expected bytes" in refusal(encoder, row(3))
    assert "aspect ratio must be smaller than 200" in refusal(encoder, row(png(300, 1)))


def test_markers_must_match_images(make_encoder, png):
    line = refusal(make_encoder(), row(png(), problem="<image> and <image>?"))
    assert line.startswith("image token mismatch: 2 <image> in `problem` but 1 in `images`; ")
    one = {"images": [png(), png()], "problem": "<image>?", "answer": "1"}
    assert refusal(make_encoder(), one).startswith("image token mismatch: 1 <image> in `problem` but 2 in `images`; ")
    assert refusal(make_encoder(), row(problem="<image>?")).startswith("image token mismatch: 1 <image>")


def test_prompt_too_long(make_encoder, png):
    encoder = make_encoder(max_prompt_tokens=60)
    assert len(encoder.encode(row(png(28, 28)), 0, "s").token_ids) <= 60
    line = refusal(encoder, row(png(224, 224)))
    length = len(make_encoder().encode(row(png(224, 224)), 0, "s").token_ids)
    assert line == (
        f"prompt too long: {length} tokens (64 of images) > data.max_prompt_tokens 60; "
        "raise it, or lower data.max_pixels"
    )
    exact = make_encoder(max_prompt_tokens=length).encode(row(png(224, 224)), 0, "s")
    assert len(exact.token_ids) == length


def test_checking_refuses_what_encoding_refuses(make_encoder, png):
    for width, height in [(28, 28), (500, 333), (31, 640), (300, 1), (1200, 900)]:
        columns = row(png(width, height))
        for limit in (90, 91, 92, 100, 200):
            encoder = make_encoder(max_prompt_tokens=limit)
            reasons = []
            for attempt in (lambda: encoder.encode(columns, 0, "s"), lambda: encoder.check(columns)):
                try:
                    attempt()
                    reasons.append(None)
                except (BadRow, Unusable) as bad:
                    reasons.append(getattr(bad, "reason", str(bad)))
            assert reasons[0] == reasons[1]


def test_text_only_model(text_tokenizer, png):
    encoder = PromptEncoder(text_tokenizer, None, DataConfig(train="unused", instruction="Box it."))
    text = text_tokenizer.decode(encoder.encode(row(), 0, "s").token_ids)
    assert text == "<|im_start|>user\nHow many?\nBox it.<|im_end|>\n<|im_start|>assistant\n"
    assert "model.path is a text-only model: it has no preprocessor_config.json" in refusal(encoder, row(png()))


def test_template_without_images(tokenizer, image_processor, png, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content[-1].text }}")
    encoder = PromptEncoder(tokenizer, image_processor, DataConfig(train="unused"))
    assert refusal(encoder, row(png())).startswith(
        "image token mismatch: the chat template of model.path made 0 <|image_pad|> for 1 images"
    )


@pytest.mark.parametrize("template", ["", "{", "{{ messages[0].content[:4] }}", "{{ messages[0].content | upper }}"])
def test_a_template_that_leaves_out_or_changes_the_problem(text_tokenizer, monkeypatch, template):
    """As one does that was cut when its file was copied."""
    encoder = PromptEncoder(text_tokenizer, None, DataConfig(train="unused"))
    monkeypatch.setattr(text_tokenizer, "chat_template", "{{ messages[0].content.split() | join(' ') }}")
    encoder.encode(row() | {"problem": " How many?\r\n1 or  2? "}, 0, "s")
    monkeypatch.setattr(text_tokenizer, "chat_template", template)
    assert "the chat template of model.path leaves out or changes `problem`" in refusal(encoder, row())


def test_processors_of_a_saved_model(tokenizer, image_processor, tmp_path, png):
    tokenizer.save_pretrained(tmp_path)
    assert load_processors(tmp_path)[1] is None
    image_processor.save_pretrained(tmp_path)
    loaded = PromptEncoder(*load_processors(tmp_path), DataConfig(train="unused"))
    given = PromptEncoder(tokenizer, image_processor, DataConfig(train="unused"))
    ours, theirs = (encoder.encode(row(png()), 0, "s") for encoder in (loaded, given))
    assert torch.equal(ours.token_ids, theirs.token_ids) and torch.equal(ours.pixel_values, theirs.pixel_values)


@pytest.mark.parametrize(
    ("template", "reason"), [(None, "its tokenizer has none"), ("{% if %}", "Expected an expression, got 'end of")]
)
def test_a_model_without_a_usable_chat_template_is_said_once(tokenizer, tmp_path, template, reason):
    """And not of every row."""
    without = copy.deepcopy(tokenizer)
    without.chat_template = template
    without.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=f"^model.path {tmp_path}: no usable chat template: {reason}.*; give a model that"
    ):
        load_processors(tmp_path)


@pytest.mark.parametrize("text", ['{"size": ', '{"image_processor_type": "NoSuchProcessor"}'])
def test_a_damaged_image_processor(tokenizer, tmp_path, text):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(
        UserError, match=f"^model.path {tmp_path}: no image processor can be loaded from it: "
    ) as caught:
        load_processors(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_model_there(tmp_path):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=f"^model.path {folder}: no tokenizer can be loaded from it: .*$"):
            load_processors(folder)

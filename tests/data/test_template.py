"""`data.template`: a Jinja file makes the user's text."""

import pytest

from mssr.data.prompts import Unusable
from mssr.errors import UserError


@pytest.fixture
def encoder_with(make_encoder, tmp_path):
    """Return an encoder whose data.template has this text: `encoder_with(text, **keys)`."""

    def make(text, **keys):
        (tmp_path / "t.jinja").write_text(text)
        return make_encoder(**{"instruction": None, "template": str(tmp_path / "t.jinja")} | keys)

    return make


@pytest.fixture
def made(encoder_with, tokenizer):
    """Return the user turn that a template makes of a row."""

    def make(template, row, **keys):
        prompt = encoder_with(template, **keys).encode({"answer": "1"} | row, 0, "s")
        return tokenizer.decode(prompt.token_ids).partition("user\n")[2].partition("<|im_end|>")[0]

    return make


PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def test_problem_content_and_columns(made):
    row = {"problem": " What? ", "level": 3, "choices": ["a", "b"], "a b": "c"}
    assert made("{{ content | trim }}!", row) == made("{{ problem | trim }}!\n", row) == "What?!"  # as EasyR1's files
    text = (
        "{{ problem }}{% for c in choices %}\n{{ loop.index }}. {{ c }}{% endfor %} ({{ level }}, {{ columns['a b'] }})"
    )
    assert made(text, row) == " What? \n1. a\n2. b (3, c)"
    assert made("{{ problem }}{{ hint if hint is defined else '' }}", row) == " What? "


def test_an_instruction_follows_only_if_it_is_set(made):
    assert made("{{ problem }}", {"problem": "What?"}) == "What?"
    assert made("{{ problem }}", {"problem": "What?"}, instruction="Box it.") == "What?\nBox it."


def test_pictures_are_never_lost(made, encoder_with, png):
    row = {"problem": "Is <image> in <image>?", "images": [png(28, 28)] * 2}
    assert made("{{ problem }}", row) == f"Is {PICTURE} in {PICTURE}?"
    assert made("{{ problem | replace('<image>', 'it') }}", row) == f"{PICTURE * 2}Is it in it?"
    with pytest.raises(Unusable, match="mismatch: 3 <image> in data.template but 2 in `images`"):
        encoder_with("<image>{{ problem }}").check(row | {"answer": "1"})


def test_the_last_user_turn_of_a_conversation_is_made(made):
    turns = [("user", "One."), ("assistant", "Yes."), ("user", "Two?")]
    row = {"problem": [{"role": role, "content": text} for role, text in turns]}
    assert made("{{ problem }}", row) == "One."
    text = made("Say: {{ problem }}", {"problem": row["problem"][-1:]})
    assert text == "Say: Two?"


def test_what_is_read_stays_what_is_in_the_row(encoder_with):
    encoder = encoder_with("{{ problem }} {{ level }}")
    prompts = [encoder.encode({"problem": "?", "answer": "1", "level": level}, 0, "s") for level in (1, 2)]
    assert [prompt.problem for prompt in prompts] == ["?", "?"]
    assert prompts[0].key != prompts[1].key  # other prompts


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a\n{{ problem }} {{ nothing }}", ", line 2: 'nothing' is undefined; fix it, or the row"),
        ("{{ problem }}\n\n{{ 1 / 0 }}", ", line 3: division by zero;"),
        ("{{ answer }}", ", line 1: 'answer' is undefined;"),  # it would tell the model
        ("{{ problem.__class__.__mro__ }}", ", line 1: access to attribute '__class__'"),
        ("{{ problem if false else '' }}", ": makes no text of this row;"),
    ],
)
def test_errors_of_a_row_name_file_and_line(encoder_with, tmp_path, text, why):
    with pytest.raises(Unusable) as caught:
        encoder_with(text).check({"problem": "What?", "answer": "1"})
    assert str(caught.value).startswith(f"data.template {tmp_path}/t.jinja{why}")


def test_special_tokens(encoder_with):
    with pytest.raises(Unusable, match="^data.template contains the special token <.im_end.>; remove it"):
        encoder_with("{{ problem }}<|im_end|>").check({"problem": "?", "answer": "1"})


def test_files_that_are_no_template(encoder_with, make_encoder, tmp_path):
    with pytest.raises(
        UserError, match=f"^data.template {tmp_path}/t.jinja, line 2: not valid Jinja: Encountered unknown"
    ):
        encoder_with("{{ problem }}\n{% nothing %}")
    with pytest.raises(UserError, match="t.jinja, line 1: not valid Jinja: No filter named 'random'"):
        encoder_with("{{ choices | random }}")
    with pytest.raises(
        UserError, match=f"^data.template {tmp_path}/no.jinja: not a readable text file: No such file or"
    ):
        make_encoder(template=str(tmp_path / "no.jinja"))

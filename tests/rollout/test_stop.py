"""Where a response ends by a stop text, in its tokens. The engines' part is in test_contract."""

import pytest
from policy_helpers import processors

from mssr.rollout.stop import StopTexts


@pytest.mark.parametrize(
    "text, stops, kept",
    [
        ("so 12 is it", ["12"], "so 12"),
        ("so 12 is it", ["is", "12"], "so 12"),
        ("so 12 is it", ["12 is it"], "so 12 is it"),
        ("so 12 is it", ["<|im_end|>", "13"], None),
        ("für 3 €, immer", ["€"], "für 3 €"),
        ("für 3 €, immer", ["ü", "€"], "fü"),
        ("ab😀😀cd", ["😀c"], "ab😀😀c"),
        ("", ["a"], None),
        ("anything", [], None),
    ],
)
def test_the_tokens_up_to_the_first_stop_text(text, stops, kept):
    """Also a text of several tokens, and one whose characters are several tokens."""
    tokenizer, _ = processors()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    length = StopTexts(stops, tokenizer).length(tokens)
    if kept is None:
        assert length is None
    else:
        assert length is not None
        assert any(stop in tokenizer.decode(tokens[:length]) for stop in stops)
        assert not any(stop in tokenizer.decode(tokens[: length - 1]) for stop in stops)
        assert tokenizer.decode(tokens[:length]).startswith(kept)


def test_a_token_in_which_a_text_ends_stays_whole():
    tokenizer, _ = processors()
    whole = next(token for token in range(280, 300) if len(tokenizer.decode([token]).strip()) > 2)
    text = tokenizer.decode([whole])
    tokens = [*tokenizer.encode("7 8"), whole, *tokenizer.encode(" 9")]
    assert StopTexts(["8" + text[:2]], tokenizer).length(tokens) == len(tokens) - len(tokenizer.encode(" 9"))


def test_half_a_character_is_no_stop_text():
    """A row of tokens may end, or be cut off, within one."""
    tokenizer, _ = processors()
    euro = tokenizer.encode("€")
    assert len(euro) == 3
    assert StopTexts(["€"], tokenizer).length(euro[:2]) is None
    assert StopTexts(["€"], tokenizer).length([*euro[:2], *euro, *euro]) == 5


def test_the_last_tokens_are_enough_to_see_it():
    """As many as the text has bytes, whatever comes before."""
    tokenizer, _ = processors()
    stop = StopTexts(["€uro"], tokenizer)
    tokens = tokenizer.encode("für 12 €uro")
    assert stop.found([tokens[-stop.longest :], tokens[:-1][-stop.longest :]]) == [True, False]

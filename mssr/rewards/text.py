"""One spelling for answers that are plain text."""

import re
import string
import unicodedata

_ENDS = " \t\n.,;:!?…。，；：！？\"'`“”‘’«»"
_ARTICLE = re.compile(r"(?:the|an?) (?=\S)")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def spelled(text: str, *, case: bool = False) -> str:
    """Return the text in Unicode's NFKC, with single spaces, without quotes and punctuation around it.

    Unless `case` counts, it is folded, and an article at the start is left out. Punctuation inside stays: 3.5 is not 35.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).split()).strip(_ENDS)
    if case:
        return text
    text = text.casefold()
    return text[article.end() :] if (article := _ARTICLE.match(text)) else text


def spelled_as_squad(text: str) -> str:
    """Return the text as SQuAD's evaluation normalises it: lower case, without ASCII punctuation and articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())

"""Tells mathematics, which the library may read, from words, which it would read as products of letters.

What has two readings is not mathematics either: `1 2`, which the library adds, and `1/2x`.
"""

import re

_FUNCTIONS = "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln lg exp max min gcd lcm"
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi psi omega "
    "Gamma Delta Theta Lambda Sigma Phi Psi Omega"
)
_OPERATORS = "int sum prod lim infty rightarrow partial lfloor rfloor lceil rceil begin end"
_SHORT = "no on of or so is it in to at up us we he me my be by as an am do go if ok"
GREEK = _GREEK.split()
FUNCTIONS = frozenset(_FUNCTIONS.split())
_CONSTANT_COMMANDS = FUNCTIONS | {"frac", "sqrt", "pi", "cdot", "times", "div", "infty", "binom"}
_COMMANDS = _CONSTANT_COMMANDS | frozenset(GREEK) | frozenset(_OPERATORS.split())
_SHORT_WORDS = frozenset(_SHORT.split())
_CALL = re.compile(rf"\b(?:{'|'.join(sorted(FUNCTIONS))})\(")
_VECTOR = re.compile(r"\\(?:vec|overrightarrow)\{\w+'?\}")
_MULTIPLIED = re.compile(r"\\cdot|\\times|[|^]|\\xi_\{\d+\} ?[(\\\w]|\) ?(?:\(|\\xi)")
_MATRIX = re.compile(r"\\(?:begin|end)\{[pbvBV]?matrix\}")
_CHARACTERS = re.compile(r"[A-Za-z0-9+\-*/^_{}()|!.%°=\\ \[\]]+")
_FORMULA = re.compile(  # H2O, H_2O, CO_2, Fe^{3+}
    r"[A-Z][a-z]?\d|[A-Z][a-z]?_\{\d+\}[A-Z(]|(?:[A-Z][a-z]?)+_\{\d+\}(?![+*/=^-])(?!$)|(?:[A-Z][a-z]?){2}_\{\d"
    r"|\^\{\d*[+-]\}"
)

# 4/3\pi is \frac{4}{3}\pi, as symbolic.py reads it. 1/2x may be \frac{x}{2} or \frac{1}{2x}.
_SIMPLE_FRACTION = re.compile(r"(?<![\d./])\d+/\d+(?=\\(?:pi|sqrt))")
_DIVIDED_FURTHER = re.compile(
    r"/(?:[\d.]++|\\pi|\\sqrt\{[^{}]*\}|\([^()]*\)|[a-zA-Z])(?:\^\{[^{}]*\})?"
    r" ?(?:[a-zA-Z(]|\d|\\(?!cdot|times))"
)


def is_constant(text: str) -> bool:
    r"""Whether the text is a number made of digits, operators, \sqrt, \pi and the like, without variables."""
    if "%" in text or "=" in text or ("°" in text and not re.search("sin|cos|tan|cot|sec|csc", text)):
        return False  # units
    letters = re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "#", text).replace("e^", ""))
    return letters is None and _readable(text, _CONSTANT_COMMANDS)


def is_mathematics(text: str) -> bool:
    """Whether the library may read the text."""
    without = _MATRIX.sub("", text)
    if without != text:
        return re.fullmatch(r"[\w+\-*/^{}()&\\. ]+", without, re.ASCII) is not None
    return _readable(text, _COMMANDS)


def is_product(text: str) -> bool:
    """Whether the text is a product of two variables if the other answer is mathematics, and a word if that is one."""
    return re.fullmatch("[a-z]{2}", text) is not None and text not in _SHORT_WORDS


def combinations(*texts: str) -> list[str] | None:
    r"""Return the texts with letters for the vectors, if they are sums of vectors: products follow other rules."""
    vectors = sorted(set(_VECTOR.findall(" ".join(texts))))
    named = [_VECTOR.sub(lambda found: f"\\xi_{{{vectors.index(found[0])}}}", text) for text in texts]
    apart = not any(map(_MULTIPLIED.search, named)) and not any("\\xi" in text for text in texts)
    return named if apart and all(map(_VECTOR.search, texts)) else None


def _readable(text: str, commands: frozenset[str]) -> bool:
    if not _CHARACTERS.fullmatch(text) or _FORMULA.search(text) or set(re.findall(r"\\([a-zA-Z]+)", text)) - commands:
        return False
    unpaired = text
    while (inner := re.sub(r"\([^(){}]*\)|\{[^(){}]*\}", "", unpaired)) != unpaired:
        unpaired = inner
    if re.search("[(){}]", unpaired):
        return False
    if re.search(r"\[", re.sub(r"\\sqrt\[\w\]", "", text)):
        return False
    if re.search(r"\d/\d+/\d|^[\d.]+(?:-[\d.]+)+$", text):  # dates and ranges
        return False
    if re.search(r"\d\s+[\d.]|\d\{\d|(?<![a-zA-Z}\]^_])\{[^{}]*\}[{\d]", text):  # 1 2 is neither 3 nor 2
        return False
    if re.search(r"[\d)]_", text):  # 101_2: another base
        return False
    if _DIVIDED_FURTHER.search(_SIMPLE_FRACTION.sub("1", text)):
        return False
    bare = re.sub(r"\\[a-zA-Z]+", " ", text)
    if "\\int" in text:
        bare = re.sub(r" ?d[a-z](?![a-z])", "", bare)
    runs = [run for run in re.findall(r"[a-zA-Z]+", bare) if run not in FUNCTIONS]
    if any(len(run) > 2 or run.lower() in _SHORT_WORDS for run in runs):
        return False
    operators = re.search(r"[\d+\-*/^_!|]|\\", text) or _CALL.search(text)
    if not operators and sum(map(len, runs)) > 1:  # words, also l e f t
        return False
    return re.search(r"(?<![\\a-zA-Z])[a-zA-Z]\d", bare) is None

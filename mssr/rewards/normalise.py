"""Rewrites an answer into one spelling: plain characters, one LaTeX command per meaning, no layout, no wrappers.

It only changes how an answer is written, never what it says: `３０°`, `30^{\\circ}` and `30\\degree` all become `30°`.
"""

import re
import unicodedata
from itertools import pairwise

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
_CHARACTERS = {
    "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "•": "\\cdot ", "÷": "\\div ", "−": "-", "–": "-",
    "—": "-", "‐": "-", "‑": "-", "∶": ":", "⁄": "/", "∕": "/", "√": "\\sqrt ", "π": "\\pi ", "∞": "\\infty ",
    "±": "\\pm ", "≤": "\\leq ", "≦": "\\leq ", "⩽": "\\leq ", "≥": "\\geq ", "≧": "\\geq ", "⩾": "\\geq ",
    "≠": "\\neq ", "≈": "\\approx ", "∈": "\\in ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "∠": "\\angle ",
    "△": "\\triangle ", "⊥": "\\perp ", "∥": "\\parallel ", "′": "'", "″": "''", "’": "'", "‘": "'", "“": '"', "”": '"',
    "、": ",", "。": ".", "【": "[", "】": "]", "〔": "(", "〕": ")", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ",
    "θ": "\\theta ", "λ": "\\lambda ", "μ": "\\mu ", "φ": "\\phi ", "ω": "\\omega ", "ρ": "\\rho ", "σ": "\\sigma ",
    "\u200b": "", "\ufeff": "", "\u2061": "", "\u2062": "",
}  # fmt: skip
# NFKC would make these characters look like others: x² like x2, º like o, 3½ like 31/2, ① like 1.
_BEFORE_NFKC = {"º": "°", "˚": "°", "∘": "°", "㎡": "m^{2}", "㎠": "cm^{2}", "㎢": "km^{2}", "㎥": "m^{3}", "㎤": "cm^{3}",
                "µ": "μ", "Ω": "Ω"}  # fmt: skip
_COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leqslant": "leq", "le": "leq", "leqq": "leq", "geqslant": "geq",
    "ge": "geq", "geqq": "geq", "ne": "neq", "gets": "leftarrow", "ast": "cdot", "bullet": "cdot", "varnothing": "emptyset",
    "parallelsum": "parallel", "doteq": "approx", "simeq": "approx", "bigtriangleup": "triangle",
    "varphi": "phi", "to": "rightarrow",
}  # fmt: skip
_SYMBOLS = {
    "lt": "<", "gt": ">", "degree": "°", "colon": ":", "lbrace": "⦃", "rbrace": "⦄", "lbrack": "[", "rbrack": "]",
    "vert": "|", "lvert": "|", "rvert": "|", "mid": "|",
    "prime": "'", "backslash": "\\", "ldots": "...", "cdots": "...", "dots": "...",
    "yen": "¥", "pounds": "£", "euro": "€",
}  # fmt: skip
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|rm|bf|it|mathop|quad|qquad|hfill|phantom\{\})"
    r"(?![a-zA-Z])|\\[,;:!]"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsf|mbox|hbox|underline)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_UPRIGHT = re.compile(
    r"\\(?:math(?:rm|bf|it|sf|tt|normal|ord|rel)|boldsymbol|bm|operatorname|ce|pu|boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_WRAPPED = [re.compile(pattern, re.DOTALL) for pattern in (
    r"\$\$([^$]+)\$\$", r"\$([^$]+)\$", r"\\\((.+)\\\)", r"\\\[(.+)\\\]", r"\*\*([^*]+)\*\*", r'"([^"]+)"', r"'([^']+)'",
    r"`([^`]+)`",
)]  # fmt: skip
_PREFIX = re.compile(
    r"(?:(?:the |so |thus |therefore,? )*(?:final |correct )?(?:answer|ans)\b(?: is(?!\w)| would be|\s*[:=])\s*:?"
    r"|答案(?:是|为|:|=)+)\s*",
    re.IGNORECASE,
)
_SYSTEM = re.compile(
    r"(?:(?:\\left\s*)?\\\{)?\s*\\begin\{(?:cases|array|aligned)\}(?:\{[lcr|]*\})?(.*?)(?:\\\\\s*)?\\end\{(?:cases|array|aligned)\}"
    r"\s*(?:\\right\s*\.)?",
    re.DOTALL,
)
# Indices that can be written without braces: H_{2}O and a_{n}, but not y_{1}0, 101_{2} or \\log_{2}8.
_INDEX = re.compile(r"(?<=[^\W\d_]|[')\]])_\{(\d+(?!\}\d)|\w+(?!\}\w))\}")
_INDEX_OF_POINT = re.compile(r"(?:(?<=[^a-zA-Z\\][A-Z])|(?<=^[A-Z]))_\{(\d+(?!\}\d))\}")
_GREEK = "pi|alpha|beta|gamma|theta|lambda|phi|omega"


def clean(text: str) -> str:
    """Return the answer with one spelling for each character and command; spaces are single, words stay apart."""
    text = _characters(text)
    text = re.sub(r"(?<!\\)\$([^$]*[^$\s\\])\$(?!\d)", r"\1", text)
    text = re.sub(r"\{\s*\\rm(?![a-zA-Z])\s*", r"\\mathrm{", text)
    text = _SYSTEM.sub(lambda found: found[1].replace("\\\\", ",").replace("&", ""), text)
    text = re.sub(r"^\s*\*\*([^*]+)\*\*", r"\1", text)
    for _ in range(4):
        stripped = _unwrap(text.strip())
        if stripped == text:
            break
        text = stripped
    text = text.replace("\\{", "⦃").replace("\\}", "⦄").replace("\\%", "%").replace("\\$", "$").replace("\\_", "_")
    text = text.replace("\\#", "#").replace("\\&", "&").replace("~", " ").replace("{,}", ",")
    text = re.sub(r"(?<!\\)\\(?=\s|$)", " ", text)
    for _ in range(5):  # nested
        before = text
        text = _TEXT.sub(r" \1 ", text)
        text = _UPRIGHT.sub(_upright, text)
        if text == before:
            break
    text = _LAYOUT.sub(" ", text)
    text = re.sub(r"\\([a-zA-Z]+)", _command, text)
    text = re.sub(r"\^\s*(?:\{\s*(?:°|\\circ|o)\s*\}|\\circ(?![a-zA-Z])|°)", "°", text)
    text = re.sub(r"(?<=[\d}])\^o(?![a-zA-Z])", "°", text)
    text = re.sub(r"\{(\d+(?:\.\d+)?)\}(?=°)", r"\1", text)
    text = re.sub(r"\^\s*(?:\{\s*('+)\s*\}|('+))", r"\1\2", text)
    text = re.sub(r"\{\s*°\s*\}", "°", text.replace("\\circ", "°").replace("{}", ""))
    text = re.sub(r"(?<=\d) ?[xX] ?(?=10 ?\^)", r"\\times ", text)
    text = re.sub(r"\\not ?=", r"\\neq ", text)
    text = (
        text.replace("!=", "\\neq ")
        .replace("<=", "\\leq ")
        .replace(">=", "\\geq ")
        .replace("**", "^")
        .replace("==", "=")
    )
    text = text.replace("+/-", "\\pm ").replace("~=", "\\approx ")
    text = re.sub(rf"(?<![\\a-zA-Z])({_GREEK}|sqrt|infinity)(?![a-zA-Z])", _spelled, text)
    text = re.sub(r"(?<=[A-Z]{2}) ?(?://|\\\|) ?(?=[A-Z]{2})", r"\\parallel ", text)
    text = re.sub(r"(?:(?<![a-zA-Z\\])[tT]riangle|\\Delta) ?(?=[A-Z]{3}(?![a-zA-Z]))", r"\\triangle ", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
    text = _unwrap(_trailing(text)).strip()
    text = re.sub(r"^(?:in )?(?:(?:the )?year:? )?(?=[12]\d{3}$)", "", text, flags=re.IGNORECASE)
    decided = re.fullmatch(r"(yes|no)[,;:.] (?!.*\b(?:yes|no|maybe|but)\b).*", text, re.IGNORECASE)
    return decided[1] if decided else text


def squeeze(text: str) -> str:
    """Return cleaned text without spaces that mean nothing, and with braces around every argument."""
    text = re.sub(r"(?<=\d), (?=[\d.+-])", ";", text)  # a list: the comma of 1,000 has no space
    text = re.sub(
        r"(?<![a-zA-Z0-9}]) | (?![a-zA-Z0-9])|(?<=}) (?=\d)"
        r"|(?<=\\frac) (?=\d)|(?<=\\sqrt) (?=\d)|(?<=\\times) (?=\d)|(?<=\\cdot) (?=\d)",
        "",
        text,
    )
    text = re.sub(r"(?<=\d) (?=\d{3}(?:\D|$))", _thousands_space, text)
    text = re.sub(r"\^\((-?\w+)\)", r"^{\1}", text)
    text = re.sub(r"([\^_])([+-]?\d+|[a-zA-Z](?![a-zA-Z]*\{)|\\[a-zA-Z]+(?![a-zA-Z{]))", r"\1{\2}", text)
    text = re.sub("(?<=[①-⑳]) ?[,;和与及]? ?(?=[①-⑳])", ",", text)
    text = _roots(text)
    text = _fractions(text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    return _unbrace(text)


def words(text: str) -> str:
    """Return the key that answers in words share: `H_{2}O` and `H2O`; `Greater  Than.` and `greater than`.

    Braces go only where nothing depends on them: `y_{1}0` is not `y_{10}`.
    """
    text = (_INDEX_OF_POINT if "\\" in text else _INDEX).sub(r"\1", text)
    text = re.sub(r"(?<=[a-zA-Z])\^(?:\{(\d+)\})?([+-])$", r"^{\1\2}", text)  # Fe^3+
    text = re.sub(r"(?<=[a-zA-Z]{2})-(?=[a-zA-Z]{2})", " ", text)
    text = re.sub(r"(?<=[^\W\d_])[.,;:!?]$|\s+", lambda found: " " if found[0].isspace() else "", text.strip())
    text = re.sub(r"^(?:the|an?) (?=[a-z]{3})", "", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<![a-zA-Z]) | (?![a-zA-Z])", lambda found: " " if _between_digits(found) else "", text)
    return text if "\\" in text else re.sub("[a-zA-Z]+", _folded, text)


def _between_digits(found: re.Match) -> bool:
    around = found.string[max(0, found.start() - 1) : found.end() + 1]
    return len(around) == 3 and around[0].isdigit() and around[2].isdigit()


def _folded(found: re.Match) -> str:
    """Fold the case of a word, but not of a chemical formula (`Co`, `CO`), a name of points (`ABC`) or a symbol."""
    word = found[0]
    lower = word.lower()
    if lower in {"yes", "no", "true", "false", "none", "not", "am", "pm"}:
        return lower
    if len(word) <= 2:  # CO, Co, AB
        return word
    if word[1:].islower():
        return lower
    steps = {ord(b) - ord(a) for a, b in pairwise(word)}
    return lower if word.isupper() and steps != {1} and any(vowel in word[1:] for vowel in "AEIOU") else word


def _characters(text: str) -> str:
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+", lambda found: "_{" + found[0].translate(_SUBSCRIPTS) + "}", text)
    return "".join(map(_character, text))


def _character(character: str) -> str:
    if character in _BEFORE_NFKC:
        return _BEFORE_NFKC[character]
    if "\u2460" <= character <= "\u24ff":
        return character
    name = unicodedata.name(character, "")
    normal = unicodedata.normalize("NFKC", character)
    if name.startswith("VULGAR FRACTION") and "⁄" in normal:
        above, _, below = normal.partition("⁄")
        return f"\\frac{{{above}}}{{{below}}}"
    return "".join(_CHARACTERS.get(each, each) for each in normal)


def _unwrap(text: str) -> str:
    for wrapped in _WRAPPED:
        if found := wrapped.fullmatch(text):
            return found[1].strip()
    return text


def _upright(found: re.Match) -> str:
    """Put a space before an upright unit: 5\\mathrm{m} is 5 m, not 5 times m."""
    before = found.string[: found.start()]
    apart = before[-1:].isdigit() or before.endswith(("}", ")")) or re.search(r"\\[a-zA-Z]+$", before)
    return f" {found[1].strip()}" if apart else found[1].strip()


def _command(found: re.Match) -> str:
    name = found[1]
    return _SYMBOLS[name] if name in _SYMBOLS else f"\\{_COMMANDS.get(name, name)}"


def _spelled(found: re.Match) -> str:
    return "\\infty " if found[1] == "infinity" else f"\\{found[1]} "


def _trailing(text: str) -> str:
    return re.sub(r"(?<![.,;:])[.,;:]$", "", text.strip())


def _thousands_space(found: re.Match) -> str:
    """Drop the space of 12 345, which separates thousands; keep that of 2 345/1000, whose head is not a group of three."""
    head = re.search(r"(?<![\d.,])(\d{1,3})(?: \d{3})*$", found.string[: found.start()])
    return "" if head and not found.string[found.end() + 3 :].startswith("/") else " "


def _roots(text: str) -> str:
    r"""\sqrt2, \sqrt(x+1) and \sqrt x become \sqrt{...}."""
    text = re.sub(r"\\sqrt(\[\w\])?(\d+(?:\.\d+)?|\\pi| ?[a-zA-Z](?![a-zA-Z]))", _root, text)
    out, rest = "", text
    while (place := rest.find("\\sqrt(")) >= 0:
        end = closing(rest, place + 5)
        if end is None:
            break
        out += rest[:place] + "\\sqrt{" + rest[place + 6 : end] + "}"
        rest = rest[end + 1 :]
    return out + rest


def _root(found: re.Match) -> str:
    return f"\\sqrt{found[1] or ''}{{{found[2].strip()}}}"


def _fractions(text: str) -> str:
    r"""\frac12, \frac1{2} and \frac{1}2 become \frac{1}{2}."""
    text = re.sub(r"\\frac ?(\w) ?(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac ?(\w)(?=\{)", r"\\frac{\1}", text)
    return re.sub(r"(\\frac\{[^{}]*\}) ?(\w)", r"\1{\2}", text)


def _unbrace(text: str) -> str:
    while text.startswith("{") and closing(text, 0) == len(text) - 1 and not re.search("[,;]", text):
        text = text[1:-1]
    return text


OPEN, CLOSE = "([{⦃", ")]}⦄"


def closing(text: str, start: int) -> int | None:
    """Return where the bracket that opens at `start` is closed. Half-open intervals may mix ( and [."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in OPEN:
            depth += 1
        elif text[place] in CLOSE:
            depth -= 1
            if depth == 0:
                return place
    return None

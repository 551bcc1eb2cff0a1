"""Rewrites an answer into one spelling: plain characters, one LaTeX command per meaning, no layout, no wrappers.

It only changes how an answer is written, never what it says: `３０°`, `30^{\\circ}` and `30\\degree` all become `30°`.
"""

import re
import unicodedata
from itertools import pairwise

from mssr.rewards.mathematics.numbers import NUMBER_WORDS

_CHARACTERS = {  # Greek letters: _character
    "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "•": "\\cdot ", "÷": "\\div ", "−": "-", "–": "-",
    "—": "-", "‐": "-", "‑": "-", "∶": ":", "⁄": "/", "∕": "/", "√": "\\sqrt ", "∞": "\\infty ",
    "±": "\\pm ", "≤": "\\leq ", "≦": "\\leq ", "⩽": "\\leq ", "≥": "\\geq ", "≧": "\\geq ", "⩾": "\\geq ",
    "≠": "\\neq ", "≈": "\\approx ", "∈": "\\in ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "∠": "\\angle ",
    "△": "\\triangle ", "⊙": "\\odot ", "⊥": "\\perp ", "∥": "\\parallel ", "≅": "\\cong ", "≌": "\\cong ",
    "∛": "\\sqrt[3]", "∜": "\\sqrt[4]", "⊂": "\\subset ", "⊃": "\\supset ", "⊆": "\\subseteq ", "⊇": "\\supseteq ",
    "⊊": "\\subsetneq ", "∉": "\\notin ", "∽": "\\sim ", "∼": "\\sim ", "→": "\\rightarrow ",
    "′": "'", "″": "''", "’": "'", "‘": "'", "“": '"', "”": '"',
    "、": ",", "。": ".", "【": "[", "】": "]", "〔": "(", "〕": ")", "\u200b": "", "\ufeff": "", "\u2061": "", "\u2062": "",
}  # fmt: skip
# NFKC would make these characters look like others: x² like x2, º like o, 3½ like 31/2, ① like 1.
_BEFORE_NFKC = {
    "º": "°", "˚": "°", "∘": "°", "㎡": "m^{2}", "㎠": "cm^{2}", "㎢": "km^{2}", "㎥": "m^{3}", "㎤": "cm^{3}",
    "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}",
    "ŷ": "\\hat{y}",
}  # fmt: skip
_COMMANDS = {
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "leqslant": "\\leq", "le": "\\leq", "leqq": "\\leq",
    "geqslant": "\\geq", "ge": "\\geq", "geqq": "\\geq", "ne": "\\neq", "gets": "\\leftarrow", "to": "\\rightarrow",
    "ast": "\\cdot", "bullet": "\\cdot", "bigcup": "\\cup", "bigcap": "\\cap", "varnothing": "\\emptyset",
    "parallelsum": "\\parallel", "doteq": "\\approx", "simeq": "\\approx", "bigtriangleup": "\\triangle",
    "varphi": "\\phi", "varepsilon": "\\epsilon", "lor": " or ", "vee": " or ", "land": " and ", "wedge": " and ",
    "lt": "<", "gt": ">", "vert": "|", "lvert": "|", "rvert": "|", "mid": "|", "degree": "°", "circ": "°", "prime": "'",
    "colon": ":", "ldots": "...", "cdots": "...", "dots": "...", "backslash": "\\", "lbrace": "⦃", "rbrace": "⦄",
    "langle": "⟨", "rangle": "⟩", "subsetneqq": "\\subsetneq", "lbrack": "[", "rbrack": "]",
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
_WRAPPED = re.compile(r"(\$\$?|\*\*|[\"'`])([^$*\"`]+)\1|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_PREFIX = re.compile(
    r"(?:(?:the |so |thus |therefore,? )*(?:final |correct )?(?:answer|ans|option|choice)\b"
    r"(?: is(?!\w)| would be|\s*[:=])\s*:?"
    r"|故?答案(?:是|为|:|=)+)\s*",
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
_VECTOR = re.compile(r"\\(?:vec|hat|mathbf|boldsymbol|bm)\s*\{(?:\\(?:mathbf|boldsymbol|bm)\s*\{)?([ijk])\}?\}")
_ARRAY = re.compile(
    r"(?:\\left\s*)?[(\[]\s*\\begin\{array\}\{[lcr|]*\}(.*?)\\end\{array\}\s*(?:\\right\s*)?[)\]]", re.DOTALL
)
_ESCAPED = {
    "\\{": "⦃", "\\}": "⦄", "\\%": "%", "\\$": "$", "\\_": "_", "\\#": "#", "\\&": "&", "{,}": ",", "{:}": ":",
    "~=": "\\approx ", "~": " ",
}  # fmt: skip
_ASCII = {"{}": "", "!=": "\\neq ", "<=": "\\leq ", ">=": "\\geq ", "**": "^", "==": "=", "+/-": "\\pm "}
_MONTH = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    "|nov(?:ember)?|dec(?:ember)?"
)
_DAY = "mon(?:day)?|tue(?:s(?:day)?)?|wed(?:nesday)?|thu(?:rs(?:day)?)?|fri(?:day)?|sat(?:urday)?|sun(?:day)?"
_TH = "(?:st|nd|rd|th)?"
_GEOMETRY = {
    "parallel": "\\parallel", "perp": "\\perp", "perpendicular": "\\perp", "similar": "\\sim", "congruent": "\\cong",
    "平行": "\\parallel", "垂直": "\\perp", "相似": "\\sim", "全等": "\\cong",
}  # fmt: skip
_REWRITTEN = [(re.compile(pattern), replacement) for pattern, replacement in (
    # degrees and primes: 30^{\circ}, 30^o, {30}°, A^{\prime}
    (r"\^\s*(?:\{\s*(°|'+)\s*\}|(°|'+))", r"\1\2"),
    (r"(?<=[\d}])\^(?:o(?![a-zA-Z])|\{o\})", "°"),
    (r"\{(\d+(?:\.\d+)?)\}(?=°)", r"\1"),
    (r"\{\s*°\s*\}", "°"),
    # mathematics in plain characters: 3x10^8, pi, sqrt(2), (0,1) U (2,3)
    (r"(?<=\d) ?[xX] ?(?=10 ?\^)", r"\\times "),
    (r"\\not ?=", r"\\neq "),
    (r"(?<![\\\w])(?:[iI]nfinity|infty|inf|oo)(?!\w)", r"\\infty "),
    (r"(?<![\\a-zA-Z])(pi|alpha|beta|gamma|theta|lambda|phi|omega|sqrt)(?![a-zA-Z])", r"\\\1 "),
    (r"(?<![\\a-zA-Z])cbrt(?=\()", r"\\sqrt[3]"),
    (r"(?<![\\a-zA-Z])log(2|10)(?=\()", r"\\log_{\1}"),
    (r"(?:[tT]he )?(?<![a-zA-Z] )(?:[sS]quare )?\b[rR]oot(?: of)? (\d+)", r"\\sqrt{\1}"),
    (r"(?<!\d)(\d+\.\d*?)(\d{1,3}?)\2{2,}+ ?\.\.\.", r"\1\\overline{\2}"),
    (r"^(\d+) (?:out of|in) (\d+)$", r"\\frac{\1}{\2}"),
    (r"\bhalf an? ", "half "),
    (r"^百分之(.+)$", r"\1%"),
    (r"(?<=\d) ?又 ?(?=[\d\\])", " "),
    (r"(?i)(?<=\d) ?(?:degrees?|度)(?!\w| ?(?:[cf]\b|celsius|fahrenheit))", "°"),
    (r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup "),
    # sets, bases, combinations: {}, 101_{two}, 101_{(2)}, (101)_2
    (r"^⦃ ?⦄$", r"\\emptyset"),
    (rf"(?<=[\dA-F)])_\{{ ?({'|'.join(NUMBER_WORDS)}) ?\}}", lambda found: f"_{{{NUMBER_WORDS[found[1]]}}}"),
    (r"(?<=[\dA-F)])_\{?\((\d+)\)\}?", r"_{\1}"),
    (r"(?<!\w)\(([\dA-F]+)\)(?=_\{?\d)", r"\1"),
    (r"\{ ?(\w+) ?\\choose ?(\w+) ?\}", r"\\binom{\1}{\2}"),
    # geometry: point A, AB//CD, AB is parallel to CD, triangle ABC, \angle{1}
    (r"^(?:[pP]oint|点) ?(?=[A-Z]$)", ""),
    (r"(?<![a-zA-Z])m ?(?=\\angle)", ""),
    (r"(?<=[A-Z]{2}) ?(?://|\\\|) ?(?=[A-Z]{2})", r"\\parallel "),
    (r"(?:(?<![a-zA-Z\\])[tT]riangle|三角形|\\Delta) ?(?=[A-Z]{3}(?![a-zA-Z]))", r"\\triangle "),
    (r"(?:线段|\b[sS]egment ) ?([A-Z]{2})(?![a-zA-Z])", r"\\overline{\1}"),
    (r"直线(?=[A-Z]{2})", "line "),
    (r"(?:直线|\b[lL]ine )(?=[a-z](?![\w']))", ""),
    (r"(?<!三)角(?=[A-Z])", r"\\angle "),
    (
        r"(?<=[\w}]) (?:is |are )?(parallel|perp|perpendicular|similar|congruent) to "
        r"(?=\\|[A-Z]{2}|[a-z]\b|line |[tT]riangle [A-Z])",
        lambda found: f" {_GEOMETRY[found[1]]} ",
    ),
    (r"(?<=[A-Z]{2})[与和](\\triangle ?[A-Z]{3}|[A-Z]{2})(平行|垂直|相似|全等)$", r"\2\1"),
    (r"(?<=[A-Z]{2})(平行|垂直|相似|全等)于?(?=[A-Z\\])", lambda found: f" {_GEOMETRY[found[1]]} "),
    (r"\\(angle|triangle|odot) ?\{(\w+)\}", r"\\\1 \2"),
    # times and dates: 3:30 p.m., 02:05, 5 March 2019, March 5th, 2019
    (r"(?i)(?<=\d) ?([ap])\.?m\b\.?", r" \1m"),
    (r"(?<![\d:.])(\d{1,2}) o'clock", r"\1:00"),
    (r"(?i)(?<![\d:.])(\d{1,2})(?:(:\d\d)(?: (am|pm))?| ()(am|pm))(?![\w:])", lambda found: _time(found)),
    (rf"(?i)\b(\d{{1,2}}){_TH} (?:of )?({_MONTH})\.?,? (\d{{4}})\b", r"\2 \1 \3"),
    (rf"(?i)\b({_MONTH})\.? (\d{{1,2}}){_TH},? (\d{{4}})\b", lambda found: f"{found[1][:3]} {found[2]} {found[3]}"),
    (rf"(?i)\b({_MONTH})\.?,? (?:of )?(\d{{4}})\b", lambda found: f"{found[1][:3]} {found[2]}"),
    (rf"(?i)\b(\d{{4}}),? ({_MONTH})$", lambda found: f"{found[2][:3]} {found[1]}"),
    (rf"(?i)^({_MONTH}|{_DAY})\.?$", lambda found: found[1][:3]),
    (r"(?i)\b(\d{4}),? ?q([1-4])\b", r"Q\2 \1"),
    (r"(?i)\bq([1-4]),? (?:of )?(\d{4})\b", r"Q\1 \2"),
    (r"(?<=\d0)'s\b", "s"),
    (r"\s+", " "),
)]  # fmt: skip
_NAMES = {  # of whole answers
    "\\emptyset": "empty set; 空集",
    "\\mathbb{R}": "all real numbers; all reals; 全体实数; (-\\infty,\\infty); (-\\infty,+\\infty)",
    "yes": "是", "no": "否; 不是", "true": "正确; 对", "false": "错误; 错", "center": "centre",
    "united states": "US; usa; U.S; u.s", "united kingdom": "UK; U.K",
    "first quadrant": "quadrant I; 1st quadrant; quadrant1; 第一象限",
    "second quadrant": "quadrant II; 2nd quadrant; quadrant2; 第二象限",
    "third quadrant": "quadrant iii; 3rd quadrant; quadrant3; 第三象限",
    "fourth quadrant": "quadrant IV; 4th quadrant; quadrant4; 第四象限",
}  # fmt: skip
_SYNONYMS = {name: meant for meant, names in _NAMES.items() for name in names.split("; ")}
_SQUEEZED = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<=\d), (?=[\d.+-])", ";"),  # a list: the comma of 1,000 has no space
    # spaces that mean nothing: not those between letters and digits, which make units and mixed numbers
    (r"(?<![a-zA-Z0-9}]) | (?![a-zA-Z0-9])|(?<=}) (?=\d)", ""),
    (r"(?<=\\frac) (?=\d)|(?<=\\sqrt) (?=\d)|(?<=\\times) (?=\d)|(?<=\\cdot) (?=\d)", ""),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])", lambda found: found[0].replace(" ", "")),
    (r"\\(hat|vec|bar) ?([a-zA-Z])(?![a-zA-Z])", r"\\\1{\2}"),
    # braces around every argument: x^2, \sqrt2, \sqrt(x+1), \frac12, \frac1{2}, \frac{1}2
    (r"([\^_])([+-]?\d+|[a-zA-Z](?![a-zA-Z]*\{)|\\[a-zA-Z]+(?![a-zA-Z{]))", r"\1{\2}"),
    (r"\\sqrt(\[\w\])? ?(\d+(?:\.\d+)?|\\pi|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt\1{\2}"),
    (r"\\sqrt(\[\w\])?\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt\1{\2}"),
    (r"\\frac ?(\w) ?(\w)", r"\\frac{\1}{\2}"),
    (r"\\frac ?(\w)(?=\{)", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\}) ?(\w)", r"\1{\2}"),
    # choices: C_5^2, C^2_5, and A_5^2, whose order counts
    (r"(?<![\w}])([CA])\^\{(\d+)\}_\{(\d+)\}", r"\1_{\3}^{\2}"),
    (r"(?<![\w}])C_\{(\d+)\}\^\{(\d+)\}", r"\\binom{\1}{\2}"),
    (r"(?<![\w}])A_\{(\d+)\}\^\{(\d+)\}", r"\\binom{\1}{\2}\\cdot \2!"),
    (r"(?<=[①-⑳]) ?[,;和与及]? ?(?=[①-⑳])", ","),
)]  # fmt: skip


def clean(text: str) -> str:
    """Return the answer with one spelling for each character and command; spaces are single, words stay apart."""
    text = _characters(text.strip())
    text = re.sub(r"(?<!\\)\$((?:[^$\\]|\\.)*[^$\s\\])\$(?!\d)", r"\1", text)
    text = re.sub(r"\{\s*\\rm(?![a-zA-Z])\s*", r"\\mathrm{", text)
    text = _ARRAY.sub(r"\\begin{bmatrix}\1\\end{bmatrix}", text)
    text = _SYSTEM.sub(lambda found: found[1].replace("\\\\", ",").replace("&", ""), text)
    text = re.sub(r"^\s*\*\*([^*]+)\*\*", r"\1", text)
    text = re.sub(r"~(?= ?\\(?:triangle|Delta))", r"\\sim ", text)
    for written, meant in _ESCAPED.items():
        text = text.replace(written, meant)
    text = re.sub(r"(?<!\\)\\(?=\s|$)", " ", text)
    text = _VECTOR.sub(r"\\vec{\1}", text)
    for _ in range(3):  # nested
        text = _UPRIGHT.sub(_upright, _TEXT.sub(r" \1 ", text))
    text = _LAYOUT.sub(" ", text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda found: _COMMANDS.get(found[1], found[0]), text)
    for written, meant in _ASCII.items():
        text = text.replace(written, meant)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = text.strip()
    text = text[prefix.end() :] if (prefix := _PREFIX.match(text)) else text
    text = re.sub(r"(?<![.,;:])[.,;:]$", "", text.strip())
    text = wrapped[wrapped.lastindex].strip() if (wrapped := _WRAPPED.fullmatch(text)) else text
    text = re.sub(r"^(?:in )?(?:(?:the )?year:? )?(?=[12]\d{3}$)", "", text, flags=re.IGNORECASE)
    return _unbrace(text)


def _time(found: re.Match) -> str:
    """Write 3:30 PM as 15:30, 5 am as 5:00 am, and 02:05 as 2:05. 3:30 stays apart from 3:30 am, too."""
    hour, minutes, half = int(found[1]), found[2] or ":00", (found[3] or found[5] or "").lower()
    if half == "pm" and hour < 12:
        return f"{hour + 12}{minutes}"
    return f"{hour}{minutes} {half}".rstrip()


def squeeze(text: str) -> str:
    """Return cleaned text without spaces that mean nothing, and with braces around every argument."""
    for pattern, replacement in _SQUEEZED:
        text = pattern.sub(replacement, text)
    return text


def words(text: str) -> str:
    """Return the key that answers in words share: `H_{2}O` and `H2O`; `Greater  Than.` and `greater than`.

    Braces go only where nothing depends on them: `y_{1}0` is not `y_{10}`.
    """
    text = (_INDEX_OF_POINT if "\\" in text else _INDEX).sub(r"\1", text)
    text = re.sub(r"(?<=[a-zA-Z])\^(?:\{(\d+)\})?([+-])$", r"^{\1\2}", text)  # Fe^3+
    text = re.sub(r"(?<=[a-zA-Z]{2})-(?=[a-zA-Z]{2})", " ", text)
    text = re.sub(r"(?<=[^\W\d_])[.,;:!?]$|\s+", lambda found: " " if found[0].isspace() else "", text.strip())
    text = re.sub(r"^(?:the|an?) (?=\w{3})", "", text, flags=re.IGNORECASE)
    text = re.sub("[a-zA-ZÀ-ɏ]{3,}", _without_accents, text)
    text = re.sub(r"(?<![a-zA-Z\d]) | (?![a-zA-Z\d])|(?<=\d) (?=[a-zA-Z])|(?<=[a-zA-Z]) (?=\d)", "", text)
    if "\\" not in text:
        text = re.sub("[a-zA-Z]+", _folded, text)
        text = re.sub(r"\b(col|fav|flav|lab|neighb|behavi)our", r"\1or", text).replace("grey", "gray")
    return _SYNONYMS.get(text, text)


def _without_accents(found: re.Match) -> str:
    return "".join(each for each in unicodedata.normalize("NFD", found[0]) if not unicodedata.combining(each))


def _folded(found: re.Match) -> str:
    """Fold the case of a word, but not of a chemical formula (`Co`, `CO`), a name of points (`ABC`) or a symbol."""
    word = found[0]
    lower = word.lower()
    if lower in {"no", "am", "pm"} or (len(word) > 2 and word[1:].islower()):
        return lower
    steps = {ord(b) - ord(a) for a, b in pairwise(word)}
    return (
        lower
        if len(word) > 2 and word.isupper() and steps != {1} and any(vowel in word[1:] for vowel in "AEIOU")
        else word
    )


def _characters(text: str) -> str:
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+", lambda found: f"_{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    return "".join(map(_character, text))


def _character(character: str) -> str:
    if character in _BEFORE_NFKC:
        return _BEFORE_NFKC[character]
    if "\u2460" <= character <= "\u24ff":
        return character
    name = unicodedata.name(character, "")
    normal = unicodedata.normalize("NFKC", character)
    if name.startswith("VULGAR FRACTION"):
        above, _, below = normal.partition("⁄")
        return f"\\frac{{{above}}}{{{below}}}"
    return "".join(map(_symbol, normal))


def _symbol(character: str) -> str:
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    greek = re.fullmatch("GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", unicodedata.name(character, ""))
    if greek is None:
        return character
    name = greek[2].replace("LAMDA", "LAMBDA")
    return f"\\{name.lower() if greek[1] == 'SMALL' else name.capitalize()} "


def _upright(found: re.Match) -> str:
    """Put a space before an upright unit: 5\\mathrm{m} is 5 m, not 5 times m."""
    apart = re.search(r"(?:[\d)}]|\\[a-zA-Z]+)$", found.string[: found.start()])
    return f"{' ' if apart else ''}{found[1].strip()}"


def _unbrace(text: str) -> str:
    """Drop braces that TeX does not print, unless the text is a set: {1,2}, {x | x>2}."""
    text = re.sub(r"^\{([a-z](?: ?\\in [A-Z])? ?[|:].*)\}$", r"⦃\1⦄", text)
    while text.startswith("{") and closing(text, 0) == len(text) - 1 and not re.search("[,;]", text):
        text = text[1:-1]
    return text


OPEN, CLOSE = "([{⦃⟨", ")]}⦄⟩"


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

"""Compares two mathematical answers with a library: math-verify's LaTeX parser reads them, sympy evaluates both to many
digits, with several values for the variables.

sympy may hang, or use up all memory, on a sampled answer, and its own timeouts are signals, which do not interrupt C code:
the comparison has to run in a process that can be killed, as rewards do.
"""

import re

DIGITS = 40
EXACT, ROUNDED = 1e-30, 1e-6  # relative differences
MIN_DIGITS = 6  # significant digits of a rounded decimal, as in mssr.rewards.mathematics.numbers
# What the variables are set to: the first one, and the step to each further one. Negative ones tell |x| from x, different
# signs |a|+|b| from |a+b|, and large ones, which are too slow for integrals and sums, |x-100| from 100-x.
POINTS = [("1.3", "0.4"), ("-2.7", "0.3"), ("0.21", "0.17"), ("3.9", "-1.1"), ("-1.7", "2.9"), ("2.3", "-5.1")]
LARGE = [("1037.3", "-2291.7"), ("-211.9", "347.3")]


class Mathematics:
    """The libraries, which are imported when the first one is made.

    kind of a comparison: value; equation (the same solutions); rounded (the second one, a decimal, is the first one, a
    constant, rounded).
    """

    def __init__(self) -> None:
        import sympy
        from latex2sympy2_extended import NormalizationConfig, latex2sympy
        from latex2sympy2_extended.latex2sympy2 import ConversionConfig
        from math_verify.grader import should_treat_as_complex

        self.sympy = sympy
        self.iterated = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit)  # slow to evaluate to many digits
        spelling = NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
        )
        symbols = ConversionConfig(lowercase_symbols=False)

        def parse(text: str, imaginary: bool):
            real = not imaginary and not should_treat_as_complex(text)
            return latex2sympy(text, is_real=real, normalization_config=spelling, conversion_config=symbols)

        self.parse = parse

    def __call__(self, kind: str, predicted: str, gold: str) -> bool:
        """Whether the answers are equal."""
        compare = {"value": self.value, "equation": self.equation, "rounded": self.rounded}[kind]
        try:
            return bool(compare(predicted, gold))
        except Exception:
            return False  # not comparable as mathematics, and the strings are known to differ

    def read(self, text: str, imaginary: bool = False):
        text = re.sub(r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|ln|log|lg|exp)(?![a-zA-Z])", r"\\\1 ", text)
        text = re.sub(r"\\lg(?![a-zA-Z])", r"\\log_{10}", text)
        if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
            text = re.sub(r"(\d+(?:\.\d+)?)°", r"{(\\frac{\1\\pi}{180})}", text)
        # Two numbers side by side are a product, unless they are a mixed number. The library would add them.
        text = re.sub(r"(?<![\d./])(\d+)/(\d+)(?=\\(?:pi|sqrt))", r"\\frac{\1}{\2}", text)
        text = re.sub(r"(?<![\d.])(\d+)\\frac\{(\d+)\}\{(\d+)\}", _mixed, text)
        text = re.sub(r"(?<=[\d)]) ?(?=\()|(?<=\)) ?(?=\d)", r"\\cdot ", text)
        text = text.replace("°", "").replace("*", "\\cdot ").replace("%", "\\cdot\\frac{1}{100}")
        found = self.parse(text, imaginary)
        if imaginary:
            found = found.subs({symbol: self.sympy.I for symbol in found.free_symbols})
        floats = found.atoms(self.sympy.Float) if hasattr(found, "atoms") else ()
        return found.xreplace({number: self.sympy.Rational(str(number)) for number in floats})

    def value(self, predicted: str, gold: str) -> bool:
        one, other = self.read(predicted), self.read(gold)
        if isinstance(one, self.sympy.MatrixBase) or isinstance(other, self.sympy.MatrixBase):
            return one.shape == other.shape and all(self.equal(*pair, EXACT) for pair in zip(one, other))
        if {str(symbol) for symbol in one.free_symbols | other.free_symbols} == {"i"}:  # complex numbers
            one, other = self.read(predicted, imaginary=True), self.read(gold, imaginary=True)
        return self.equal(one, other, self.tolerance(predicted, gold))

    def rounded(self, predicted: str, gold: str) -> bool:
        exact, decimal = self.read(predicted), self.sympy.Rational(gold)
        value = exact if exact.is_Rational else self.number(exact)
        if value is None or not value.is_real or value * decimal < 0:
            return False
        power = 10 ** len(gold.partition(".")[2])
        return self.sympy.floor(abs(value) * power + self.sympy.Rational(1, 2)) == abs(decimal) * power

    def equation(self, predicted: str, gold: str) -> bool:
        """Whether left - right of one equation is a constant multiple of the other's."""
        differences = []
        for text in (predicted, gold):
            left, _, right = text.partition("=")
            differences.append(self.read(left) - self.read(right))
        if not all(difference.free_symbols for difference in differences):  # 2=3 and 2=7
            return False
        ratio = self.sympy.simplify(differences[0] / differences[1])
        return bool(ratio.is_number and ratio.is_finite and not ratio.is_zero)

    def tolerance(self, *texts: str) -> float:
        """Only a decimal with enough digits is taken for a rounded value."""
        found = [re.findall(r"\d+\.\d+", text) for text in texts]
        digits = [max((len(number.replace(".", "").lstrip("0")) for number in numbers), default=0) for numbers in found]
        return ROUNDED if max(digits) >= MIN_DIGITS and min(digits) == 0 else EXACT

    def equal(self, one, other, tolerance: float) -> bool:
        sympy = self.sympy
        if not isinstance(one, sympy.Expr) or not isinstance(other, sympy.Expr):
            return False
        if one.has(sympy.zoo, sympy.nan) or other.has(sympy.zoo, sympy.nan):
            return False  # something divided by zero
        if one == other:
            return True
        symbols = sorted(one.free_symbols | other.free_symbols, key=str)
        if not symbols:
            return self.near(one, other, tolerance)
        for start, step in POINTS if one.has(*self.iterated) or other.has(*self.iterated) else POINTS + LARGE:
            values = {
                symbol: sympy.Rational(start) + place * sympy.Rational(step) for place, symbol in enumerate(symbols)
            }
            exact = [each.xreplace(values) for each in (one, other)]
            left, right = map(self.number, exact)
            if left is None or right is None:
                return sympy.simplify(one - other) == 0
            if not self.agree(left, right, EXACT, exact):
                return False
        return True

    def near(self, one, other, tolerance: float) -> bool:
        left, right = self.number(one), self.number(other)
        if left is None or right is None:
            return False
        if not self.agree(left, right, tolerance, (one, other)):
            return False
        if tolerance > EXACT or (one - other).has(*self.iterated):
            return True
        difference = self.sympy.N(one - other, 10, maxn=700)
        parts = difference.as_real_imag()
        return all(part == 0 or part._prec == 1 for part in parts)  # no digit of it is certain: zero

    def agree(self, left, right, tolerance: float, exact) -> bool:
        """Whether the values `left` and `right` of the two exact constants are nearly equal."""
        larger = max(abs(left), abs(right))
        if abs(left - right) <= tolerance * larger:
            return True
        # Very small ones are the cancelled digits of zero, or different numbers.
        return bool(larger < EXACT and self.sympy.simplify(exact[0] - exact[1]) == 0)

    def number(self, expression):
        """Return the value of a constant, or None."""
        value = self.sympy.N(expression, DIGITS)
        return value if value.is_number and value.is_finite and not value.has(self.sympy.nan) else None


def _mixed(found: re.Match) -> str:
    whole, above, below = map(int, found.groups())
    if above < below:
        return f"\\frac{{{whole * below + above}}}{{{below}}}"
    return f"{whole}\\cdot\\frac{{{above}}}{{{below}}}"

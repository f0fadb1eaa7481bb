"""Equations of the notebooks as MathML, which browsers show by themselves: pages need no script and no network.

Covers the TeX that the notebooks use. What it does not know stays TeX, as text, which can still be read. Source: ours.
"""

import re
from collections.abc import Iterator
from html import escape

TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|[{}^_&]|\d+(?:\.\d+)?|\.\d+|\s+|.", re.DOTALL)
IN_MARKDOWN = re.compile(
    r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?!\s)(?P<inline>[^$\n]+?)(?<!\s)\$", re.DOTALL
)
GREEK = dict(
    zip(
        "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi varphi "
        "chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split(),
        "αβγδϵεζηθκλμνξπρστϕφχψωΓΔΘΛΞΠΣΦΨΩ",
        strict=True,
    )
)
SIGNS = {
    "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "approx": "≈", "sim": "∼", "in": "∈",
    "notin": "∉", "cdot": "⋅", "times": "×", "pm": "±", "to": "→", "leftarrow": "←", "rightarrow": "→", "mapsto": "↦",
    "mid": "∣", "cap": "∩", "cup": "∪", "subset": "⊂", "dots": "…", "ldots": "…", "cdots": "⋯", "infty": "∞",
    "partial": "∂", "nabla": "∇", "top": "⊤", "bullet": "•", "prime": "′", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈",
    "rceil": "⌉", "langle": "⟨", "rangle": "⟩", "|": "‖", "lVert": "‖", "rVert": "‖", "{": "{", "}": "}", "%": "%",
    "#": "#", "&": "&", "_": "_", "$": "$", "ell": "ℓ", "propto": "∝", "ll": "≪", "gg": "≫", "forall": "∀",
}  # fmt: skip
LARGE = {"sum": "∑", "prod": "∏", "int": "∫", "bigcup": "⋃", "bigcap": "⋂"}
NAMES = ("max", "min", "arg", "log", "exp", "cos", "sin", "lim", "det", "Pr", "sup", "inf", "tanh", "ln")
UNDER = {"max", "min", "lim", "sup", "inf"}  # limits stand below, in a block
SPACES = {",": ".17em", ";": ".28em", ":": ".22em", "!": "-.17em", " ": ".25em", "quad": "1em", "qquad": "2em"}
ACCENTS = {"bar": "¯", "hat": "^", "tilde": "~", "vec": "→", "dot": "˙", "overline": "¯", "widehat": "^",
           "widetilde": "~"}  # fmt: skip
FONTS = {"mathrm": "normal", "operatorname": "normal", "text": "normal", "mathbf": "bold", "mathcal": "script",
         "mathbb": "double-struck", "textbf": "bold", "mathop": ""}  # fmt: skip
BIG = {f"{name}{side}": size for name, size in (("big", "1.2em"), ("Big", "1.8em"), ("bigg", "2.4em")) for side in
       ("", "l", "r", "m")}  # fmt: skip


class UnknownTeX(ValueError):
    """TeX that this module does not know."""


def in_markdown(text: str) -> str:
    """Markdown with each equation in dollars as a `math` element; code, and equations that are not known, unchanged."""

    def replace(found: re.Match) -> str:
        if found["code"]:
            return found[0]
        try:
            if found["block"]:
                return f'<span class="equation">{to_mathml(found["block"], block=True)}</span>'
            return to_mathml(found["inline"])
        except UnknownTeX:
            return found[0]

    return IN_MARKDOWN.sub(replace, text)


def to_mathml(tex: str, block: bool = False) -> str:
    """One equation as a `math` element. block: on a line of its own. Raises UnknownTeX."""
    display = ' display="block"' if block else ""
    return f"<math{display}>{_Reader(tex.strip(), block).row(end=None)}</math>"


class _Reader:
    """Reads tokens from left to right; each method returns MathML."""

    def __init__(self, tex: str, block: bool) -> None:
        self.tokens, self.at, self.block = TOKEN.findall(tex), 0, block

    def peek(self) -> str | None:
        while self.at < len(self.tokens) and self.tokens[self.at].isspace():
            self.at += 1
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def next(self) -> str:
        token = self.peek()
        if token is None:
            raise UnknownTeX("it ends too early")
        self.at += 1
        return token

    def row(self, end: str | None) -> str:
        """Everything up to `end`, which is read too."""
        parts = []
        while (token := self.peek()) != end:
            if token is None or token in ("}", "&", "\\\\", "\\right", "\\end"):
                raise UnknownTeX(f"{token} where {end} was expected")
            parts.append(self.scripted())
        if end is not None:
            self.next()
        return f"<mrow>{''.join(parts)}</mrow>"

    def scripted(self) -> str:
        """An atom with its sub- and superscript."""
        first = self.peek()
        base, below, above = self.atom(), None, None
        while (token := self.peek()) in ("^", "_", "'"):
            self.next()
            if token == "_":
                below = self.argument()
            else:
                above = "<mo>′</mo>" if token == "'" else self.argument()
        name = (first or "")[1:]
        beneath = self.block and (name in LARGE or name in UNDER or name in ("mathop", "underbrace"))
        if below and above:
            tag = "munderover" if beneath else "msubsup"
            return f"<{tag}>{base}{below}{above}</{tag}>"
        if below or above:
            tag = ("munder" if beneath else "msub") if below else ("mover" if beneath else "msup")
            return f"<{tag}>{base}{below or above}</{tag}>"
        return base

    def argument(self) -> str:
        """An atom; of a number without braces the first digit alone, as in \\frac12."""
        token = self.peek()
        if token is not None and token.isdigit():
            self.tokens[self.at : self.at + 1] = list(token)
        return self.atom()

    def atom(self) -> str:
        token = self.next()
        if token == "{":
            return self.row("}")
        if token in ("}", "^", "_", "&"):
            raise UnknownTeX(token)
        if token.startswith("\\"):
            return self.command(token[1:])
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return f"<mn>{token}</mn>"
        if token.isalpha():
            return f"<mi>{token}</mi>"
        stretch = ' stretchy="false"' if token in "()[]|" else ""
        return f"<mo{stretch}>{escape('−' if token == '-' else token)}</mo>"

    def command(self, name: str) -> str:
        if name in GREEK:
            return f"<mi>{GREEK[name]}</mi>"
        if name in SIGNS:
            return f'<mo stretchy="false">{escape(SIGNS[name])}</mo>'
        if name in LARGE:
            return f"<mo>{LARGE[name]}</mo>"
        if name in NAMES:
            return f'<mi>{name}</mi><mspace width=".17em"/>' if name == "arg" else f"<mi>{name}</mi>"
        if name in SPACES:
            return f'<mspace width="{SPACES[name]}"/>'
        if name in ("frac", "tfrac", "dfrac"):
            style = ' displaystyle="false"' if name == "tfrac" else ""
            return f"<mstyle{style}><mfrac>{self.argument()}{self.argument()}</mfrac></mstyle>"
        if name == "sqrt":
            return f"<msqrt>{self.argument()}</msqrt>"
        if name in ACCENTS:
            close = "" if ACCENTS[name] == "¯" else ' accent="true"'  # a bar that close touches its letter
            return f'<mover{close}>{self.argument()}<mo stretchy="false">{ACCENTS[name]}</mo></mover>'
        if name == "underbrace":
            return f"<munder>{self.argument()}<mo>⏟</mo></munder>"
        if name in BIG:
            return f'<mo minsize="{BIG[name]}" maxsize="{BIG[name]}">{self.delimiter()}</mo>'
        if name == "left":
            opening, body = self.delimiter(), self.row("\\right")
            return f"<mrow><mo>{opening}</mo>{body}<mo>{self.delimiter()}</mo></mrow>"
        if name == "mathbb" and self.peek() == "1":
            self.next()
            return "<mn>𝟙</mn>"
        if name == "mathop":
            return self.atom()
        if name in FONTS:
            return self.lettering(name)
        if name == "begin":
            return self.environment()
        raise UnknownTeX(name)

    def delimiter(self) -> str:
        token = self.next()
        sign = SIGNS.get(token[1:]) if token.startswith("\\") else "" if token == "." else token
        if sign is None:
            raise UnknownTeX(token)
        return escape(sign)

    def raw(self) -> str:
        """The characters of a group, spaces kept, or of the one token that follows."""
        if self.next() != "{":
            return self.tokens[self.at - 1]
        parts = []
        while (token := self.tokens[self.at] if self.at < len(self.tokens) else None) != "}":
            if token is None or token == "{" or (token.startswith("\\") and token[1:] not in SIGNS):
                raise UnknownTeX(f"text with {token}")
            parts.append(SIGNS[token[1:]] if token.startswith("\\") else token)
            self.at += 1
        self.at += 1
        return "".join(parts)

    def lettering(self, name: str) -> str:
        text = self.raw()
        if name in ("text", "textbf"):
            return f"<mtext>{escape(text)}</mtext>".replace(" ", "\u00a0")
        if FONTS[name] == "normal":
            return f'<mi mathvariant="normal">{escape(text.replace("-", "‑"))}</mi>'
        return f"<mi>{''.join(map(FONT_OF[name], text))}</mi>"

    def environment(self) -> str:
        name = self.raw()
        if name not in ("cases", "aligned", "matrix", "pmatrix"):
            raise UnknownTeX(f"begin {name}")
        lines = "".join(f"<mtr>{''.join(cells)}</mtr>" for cells in self.lines())
        if self.raw() != name:
            raise UnknownTeX(f"end of {name}")
        left, right = {"cases": ("{", ""), "pmatrix": ("(", ")")}.get(name, ("", ""))
        align = ' columnalign="left"' if name == "cases" else ""
        return f"<mrow><mo>{left}</mo><mtable{align}>{lines}</mtable><mo>{right}</mo></mrow>"

    def lines(self) -> Iterator[list[str]]:
        """Rows of cells of a table, up to its \\end, which is read."""
        cells: list[str] = []
        parts: list[str] = []
        while True:
            token = self.peek()
            if token in ("&", "\\\\", "\\end"):
                self.next()
                cells.append(f"<mtd>{''.join(parts)}</mtd>")
                parts = []
                if token != "&":
                    yield cells
                    cells = []
                if token == "\\end":
                    return
            else:
                parts.append(self.scripted())


def _script(letter: str) -> str:
    return {"B": "ℬ", "E": "ℰ", "F": "ℱ", "H": "ℋ", "I": "ℐ", "L": "ℒ", "M": "ℳ", "R": "ℛ"}.get(
        letter, chr(0x1D49C + ord(letter) - ord("A")) if "A" <= letter <= "Z" else letter
    )


def _double(letter: str) -> str:
    return {"C": "ℂ", "H": "ℍ", "N": "ℕ", "P": "ℙ", "Q": "ℚ", "R": "ℝ", "Z": "ℤ"}.get(
        letter, chr(0x1D538 + ord(letter) - ord("A")) if "A" <= letter <= "Z" else letter
    )


def _bold(letter: str) -> str:
    return (
        chr(0x1D41A + ord(letter) - ord("a"))
        if "a" <= letter <= "z"
        else (chr(0x1D400 + ord(letter) - ord("A")) if "A" <= letter <= "Z" else letter)
    )


FONT_OF = {"mathcal": _script, "mathbb": _double, "mathbf": _bold}

"""Equations as MathML: structure of single equations, every equation of the notebooks, what is left as it is."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from figures.report.mathml import UnknownTeX, in_markdown, to_mathml

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def outline(tex, block=False):
    """An equation as nested text: `sub(x i)`; rows of one part are that part."""

    def told(node):
        inside = [told(child) for child in node]
        if not inside:
            return (node.text or "").strip() or "_" * (node.tag == "mspace")
        if node.tag in ("mrow", "math", "mstyle"):
            return " ".join(filter(None, inside))
        return f"{node.tag[1:]}({', '.join(inside)})"

    return told(ElementTree.fromstring(to_mathml(tex, block)))


@pytest.mark.parametrize(
    "tex, shown",
    [
        ("x_i^2", "subsup(x, i, 2)"),
        ("x^{10}", "sup(x, 10)"),
        ("x^10", "sup(x, 1) 0"),
        (r"\tfrac12(a+b)", "frac(1, 2) ( a + b )"),
        (r"\frac1B \sum_b y_b", "frac(1, B) sub(∑, b) sub(y, b)"),
        (r"\sqrt{\sigma^2 + \epsilon}", "sqrt(sup(σ, 2) + ϵ)"),
        (r"\mathcal L_{\text{mix}}", "sub(ℒ, mix)"),
        (r"\bar p_{bc} \ge .95", "sub(over(p, ¯), bc) ≥ .95".replace("bc", "b c")),
        (r"\left|\mathrm{acc}(B)\right|", "| acc ( B ) |"),
        (r"\|x\|", "‖ x ‖"),
        (r"\mathbb 1[x > 0]", "𝟙 [ x > 0 ]"),
        (r"f'", "sup(f, ′)"),
        (r"a - b", "a − b"),
        (r"10\,\%", "10 _ %"),
    ],
)
def test_structure(tex, shown):
    assert outline(tex) == shown


def test_limits_stand_below_in_a_block_only():
    assert outline(r"\max_c z_c") == "sub(max, c) sub(z, c)"
    assert outline(r"\max_c \sum_{t=1}^T z", block=True) == "under(max, c) underover(∑, t = 1, T) z"
    assert outline(r"\underbrace{x}_{\text{loss}}", block=True) == "under(under(x, ⏟), loss)"


def test_cases_are_a_table():
    tex = r"w = \begin{cases} 1 & z > 0 \\ \exp(-z) & \text{otherwise} \end{cases}"
    assert outline(tex) == "w = { table(tr(td(1), td(z, >, 0)), tr(td(exp, (, −, z, )), td(otherwise)))"


@pytest.mark.parametrize(
    "tex", [r"\unknown x", "{x", "x}", r"\left( x", r"\begin{array} x \end{array}", "x_", r"\frac1"]
)
def test_what_is_not_known_is_an_error(tex):
    with pytest.raises(UnknownTeX):
        to_mathml(tex)


def test_markdown_keeps_code_and_unknown_equations():
    text = "`$a$` and $\\unknown$, ``` $b$ ```; costs 3 $ and\n4 $; $x<y$"
    assert in_markdown(text) == text.replace("$x<y$", to_mathml("x<y")) and "&lt;" in in_markdown(text)
    assert in_markdown("a\n\n$$x$$\n\nb") == f'a\n\n<span class="equation">{to_mathml("x", True)}</span>\n\nb'


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_equation_of_the_notebooks_is_known(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
    for cell in cells:
        found = in_markdown("".join(cell["source"]))
        assert not re.search(r"\$[^$\n]*\\", re.sub(r"```.*?```|`[^`\n]*`", "", found, flags=re.DOTALL)), found
        for equation in re.findall("<math.*?</math>", found):
            ElementTree.fromstring(equation)

"""Formulas as MathML, written when the site is built: no script, no network, and any browser shows them."""

import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

BARS = re.compile(r"<mo>(&#x02016;|&#x02225;|&#x0007C;)</mo>")  # of a norm; a browser stretches the first one alone


def mathml(formula, **options):
    """The formula in MathML."""
    return BARS.sub(r'<mo stretchy="false">\1</mo>', convert(formula, **options))


def inline(translator, node):
    """A formula within a sentence."""
    translator.body.append(mathml(node.astext()))
    raise SkipNode


def block(translator, node):
    """A formula on a line of its own."""
    translator.body.append(f'<div class="formula">{mathml(node.astext(), display="block")}</div>\n')
    raise SkipNode


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

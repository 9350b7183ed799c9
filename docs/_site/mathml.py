"""Formulas as MathML, written when the site is built: no script, no network, and any browser shows them."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def inline(translator, node):
    """A formula within a sentence."""
    translator.body.append(convert(node.astext()))
    raise SkipNode


def block(translator, node):
    """A formula on a line of its own."""
    translator.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>\n')
    raise SkipNode


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Formulas as MathML, which browsers draw themselves: no script, and nothing from the network."""

import html
import re

from latex2mathml.converter import convert


def _write(node, display: str) -> str:
    latex = node.astext()
    # A thin space after the name of a function, which browsers leave out.
    mathml = convert(re.sub(r"\\log\s+", r"\\log\\,", latex), display=display)
    # What the formula says, for those who copy it or cannot see it.
    return mathml.replace("<math ", f'<math alttext="{html.escape(latex, quote=True)}" ', 1)


def _visit_inline(self, node) -> None:
    from docutils.nodes import SkipNode

    self.body.append(f'<span class="math">{_write(node, "inline")}</span>')
    raise SkipNode


def _visit_block(self, node) -> None:
    from docutils.nodes import SkipNode

    self.body.append(f'<div class="math-block">{_write(node, "block")}</div>')
    raise SkipNode


def setup(app) -> dict:
    """Registers the renderer under the name `mathml`."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Sphinx extension: mathematics as MathML, made when the site is built, so that no page asks for a script."""

from typing import Any

from docutils import nodes
from sphinx.util import logging

from inference.story_math import mathml as converted

_LOGGER = logging.getLogger(__name__)


def mathml(latex: str, display: str, where: Any = None) -> str:
    """One formula; what cannot be read is a warning, and shown as it was typed."""
    try:
        return converted(latex, display)
    except Exception as error:  # latex2mathml raises errors of many kinds
        _LOGGER.warning("formula %r cannot be read: %s", latex, error, location=where)
        return f"<code>{nodes.unescape(latex)}</code>"


def visit_inline(self: Any, node: Any) -> None:
    """``$x$`` and :math:`x`."""
    self.body.append(mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def visit_block(self: Any, node: Any) -> None:
    """``$$x$$`` and the directive."""
    self.body.append(f'<div class="math">{mathml(node.astext(), "block", node)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer "mathml"."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

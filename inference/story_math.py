"""The story as mathematics for pages and papers: aligned LaTeX, MathML, and the joint density as a product."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from .plates_fold import fold_loops
from .plates_symbols import with_symbols
from .provenance import relations
from .story_text import Loop, Row, Writer, plates_of, story_rows

_RELATION = re.compile(r" (\\sim|~|=) ")
_WIDTH = 60  # letters of a density that fit into a line
_SINGLE = re.compile(r"\\mathrm\{(\w)\}")


@with_symbols
def story_latex(story: Any, *args: Any, density: bool = True, **kwargs: Any) -> str:
    r"""The story in LaTeX, aligned at its relations, and the joint density as a product.

    Parameters
    ----------
    story
        A Pyro program, or an object with a `model` method.
    *args, **kwargs
        Passed to the story.
    density
        Write the factorisation of the joint density under it.

    Returns
    -------
    str
        One `aligned` environment; it needs amsmath and stands in display mathematics.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def coin(x=None):
    ...     p = pyro.sample("p", dist.Beta(1.0, 1.0))
    ...     with pyro.plate("data", 10):
    ...         pyro.sample("x", dist.Bernoulli(p), obs=x)
    >>> print(story_latex(coin, torch.ones(10), density=False))
    \begin{aligned}
    p &\sim \mathrm{Beta}(1, 1) \\
    x_{n} &\sim \mathrm{Bernoulli}(p) &&\text{for } n = 1, \ldots, N \\
    & &&\text{where } N = 10
    \end{aligned}
    """
    cells, product = _cells(story, args, kwargs, density)
    lines = []
    for left, right, note in cells:
        lines.append(f"{left} &{right}".strip() + (f" &&{note}" if note else ""))
    told = _aligned(lines)
    if not product:
        return told
    factors = _aligned([f"{left} &{right}".lstrip() for left, right in product])
    return f"\\begin{{gathered}}\n{told} \\\\[1.5ex]\n{factors}\n\\end{{gathered}}"


def _aligned(lines: Sequence[str]) -> str:
    return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"


@with_symbols
def story_mathml(story: Any, *args: Any, density: bool = True, **kwargs: Any) -> str:
    """The same as one `<math>` element, which browsers show without a script; arguments as for `story_latex`."""
    cells, product = _cells(story, args, kwargs, density)
    return _table(cells) + (_table(product) if product else "")


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of formulas as one `<math>` element, aligned between the first and the second cell."""
    made = []
    for cells in rows:
        made.append("".join(_cell(k, cell) for k, cell in enumerate(cells)))
    table = "".join(f"<mtr>{row}</mtr>" for row in made)
    return (
        '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">'
        f'<mtable displaystyle="true" columnalign="right left left">{table}</mtable></math>'
    )


def _cell(column: int, latex: str) -> str:
    # Browsers that know MathML Core alone align by style; a relation that begins a cell keeps its space.
    side = "left" if column else "right"
    space = ("padding:.2em 0", "padding:.2em 0", "padding:.2em 0 .2em 1.6em")[column]
    inner = _readable(latex) if latex else ""
    if column == 1 and latex.startswith(("=", "\\sim")):
        inner = inner.replace("<mo>", '<mo form="infix">', 1)
    return f'<mtd style="text-align:{side};text-align:-webkit-{side};{space}">{inner}</mtd>'


@with_symbols
def story_density(story: Any, *args: Any, **kwargs: Any) -> str:
    """The joint density as a product in plain Unicode; arguments as for `story_latex`.

    Returns
    -------
    str
        ``"p(π, z, x) = p(π) ∏_n p(z_n | π) p(x_n | z_n)"``.
    """
    writer, rows = story_rows(fold_loops(relations(story, *args, **kwargs)), math_text=False)
    left, groups = _density(writer, rows)
    return f"{left} = {' '.join(groups)}"


def mathml(latex: str, display: str = "inline") -> str:
    """A formula as a `<math>` element.

    Parameters
    ----------
    latex
        Without dollar signs.
    display
        "inline" or "block".

    Notes
    -----
    Three corrections to what latex2mathml makes: a tilde is the relation it stands for, one upright letter stays
    upright, and large operators carry their limits above and below in a block.
    """
    from latex2mathml.converter import convert

    text = convert(_SINGLE.sub(r"\\text{\1}", latex).replace(".\\!", "."), display=display)
    text = text.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
    if display == "block":
        text = re.sub(r"<msub>(<mo>&#x0220F;</mo>.*?)</msub>", _under, text)
    return text


def _under(match: re.Match[str]) -> str:
    return f"<munder>{match[1]}</munder>"


def _inside(element: str) -> str:
    """What stands between the tags of a `<math>` element."""
    return element[element.index(">") + 1 : element.rindex("</math>")]


def _readable(latex: str) -> str:
    """MathML of a cell; where a site's name holds what latex2mathml cannot read, the formula as text."""
    try:
        return _inside(mathml(latex, "block"))
    except Exception:  # latex2mathml raises errors of many kinds
        return f"<mtext>{escape(latex)}</mtext>"


def _cells(
    story: Any, args: tuple, kwargs: dict[str, Any], density: bool
) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Rows of three cells (what, how it is distributed, for which indices), and of two for the density."""
    sites = fold_loops(relations(story, *args, **kwargs))
    writer, rows = story_rows(sites, math_text=True)
    cells = []
    for given in writer.declarations():
        verb, _, names = given.partition(" ")
        cells.append(("", rf"\text{{{verb} }} {names.replace('$', '')}", ""))
    for row in rows:
        found = _RELATION.search(row.text)
        left, right = (row.text[: found.start()], f"{found[1]} {row.text[found.end() :]}") if found else ("", row.text)
        note = ", \\; ".join(_range(loop) for loop in row.loops)
        cells.append((left, right, rf"\text{{for }} {note}" if note else ""))
    sizes = ", \\; ".join(rf"{writer.letters[n].size} = {p.size}" for n, p in plates_of(sites).items())
    if sizes:
        cells.append(("", "", rf"\text{{where }} {sizes}"))
    return cells, _broken(*_density(writer, rows)) if density else []


def _broken(left: str, groups: list[str]) -> list[tuple[str, str]]:
    """The density over as many lines as it needs: (left side, right side)."""
    lines: list[list[str]] = [[]]
    alone = _length(left) > _WIDTH / 2
    for group in groups:
        if lines[-1] and (0 if alone else _length(left)) + _length(" ".join([*lines[-1], group])) > _WIDTH:
            lines.append([])
        lines[-1].append(group)
    joined = [r" \, ".join(line) for line in lines]
    first = [("", left), ("", f"= {joined[0]}")] if alone else [(left, f"= {joined[0]}")]
    return [*first, *(("", rf"\quad {line}") for line in joined[1:])]


def _length(latex: str) -> int:
    """About how many letters a formula shows."""
    return len(re.sub(r"\\(left|right|mathrm|text)\b|\\[,;]|[{}_^ ]", "", re.sub(r"\\[a-z]{2,}", "m", latex)))


def _range(loop: Loop) -> str:
    return rf"{loop.index} = {loop.first}, \ldots, {loop.last}"


def _density(writer: Writer, rows: Sequence[Row]) -> tuple[str, list[str]]:
    """p(everything; given), and the factors that it is the product of, plate by plate."""
    sites = writer.sites
    told = [r for r in rows if r.site is not None and r.site.kind in ("latent", "observed", "factor")]
    random = [r.site for r in told if r.site is not None and r.site.kind != "factor"]
    bases: dict[str, None] = {}
    for site in random:
        bases[_base(writer, rows, site.name)] = None
    fixed = [writer.named(s.name, ()) for s in sites.values() if s.kind in ("input", "parameter")]
    fixed += [writer.word(s.name) for s in sites.values() if s.kind == "module"]
    separator = r" \mid " if writer.math_text else " | "
    end = f"{_semicolon(writer)}{', '.join(fixed)}" if fixed else ""
    factors = [(row.loops, _factor(writer, row, separator)) for row in told]
    equals = f"p({', '.join(bases)}{end})"
    return equals, _products(writer, factors, 0)


def _semicolon(writer: Writer) -> str:
    return r"; \; " if writer.math_text else "; "


def _base(writer: Writer, rows: Sequence[Row], name: str) -> str:
    """A site's own symbol; all steps of a chain have one."""
    for row in rows:
        if row.step is not None and name in row.step[0].place:
            return writer.named(row.step[0].place[name][0], ())
    return writer.named(name, ())


def _factor(writer: Writer, row: Row, separator: str) -> str:
    """p(site | parents), with the indices that the story's lines give them."""
    site = row.site
    assert site is not None
    writer.step = row.step
    own = writer.own(site)
    if site.kind == "factor":
        text = row.text.partition("exp")[2]
        writer.step = None
        return rf"\exp{text}" if writer.math_text else f"exp{text}"
    given: list[str] = []
    fixed: list[str] = []
    for parent in site.parents:
        kind = writer.sites[parent].kind if parent in writer.sites else "latent"
        into = fixed if kind in ("input", "parameter", "module") else given
        into.append(writer.word(parent) if kind == "module" else writer.reference(parent, site))
    writer.step = None
    condition = separator + ", ".join(given) if given else ""
    return f"p({own}{condition}{_semicolon(writer) + ', '.join(fixed) if fixed else ''})"


def _products(writer: Writer, factors: Sequence[tuple[tuple[Loop, ...], str]], depth: int) -> list[str]:
    """Neighbours under the same loop share its product sign."""
    parts: list[str] = []
    i = 0
    while i < len(factors):
        loops = factors[i][0]
        if len(loops) <= depth:
            parts.append(factors[i][1])
            i += 1
            continue
        j = i
        while j < len(factors) and len(factors[j][0]) > depth and factors[j][0][depth] == loops[depth]:
            j += 1
        inner = (r" \, " if writer.math_text else " ").join(_products(writer, factors[i:j], depth + 1))
        loop = loops[depth]
        if writer.math_text:
            sign = rf"\prod_{{{loop.index}={loop.first}}}^{{{loop.last}}} {inner}"
        else:
            sign = f"∏_{loop.index} {inner}"
        # What follows a product is no longer under its sign.
        bracket = j < len(factors) and not len(factors[j][0]) > depth
        parts.append((rf"\left[ {sign} \right]" if writer.math_text else f"[{sign}]") if bracket else sign)
        i = j
    return parts

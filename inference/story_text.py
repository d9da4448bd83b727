"""The story as mathematics: one line a site, in mathtext for figures and in Unicode for terminals."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .plates_algebra import Apply, Expr, Index, Listing, Number, Opaque, Ref
from .plates_fold import Chain, find_chains, fold_loops, used_words
from .plates_symbols import Letters, index_letters, number, spare_letter, subscripted, symbol, upright, with_symbols
from .provenance import Plate, Site, relations

_FUNCTION = "\0"  # stands for f, g, h until the lines are in order
_SUM, _PRODUCT, _POWER, _ATOM = 1, 2, 3, 4
_POWERS = {"rsqrt": "-1/2", "reciprocal": "-1", "square": "2"}


@with_symbols
def story_lines(story: Any, *args: Any, **kwargs: Any) -> list[str]:
    """The story line by line, as mathtext.

    Parameters
    ----------
    story
        A Pyro program, or an object with a `model` method.
    *args, **kwargs
        Passed to the story.

    Returns
    -------
    list of str
        ``"    $z_{n} \\sim \\mathrm{Categorical}(\\pi)$"`` for a site, ``"for $n$ in 1..$N$  data:"`` for a
        plate; four spaces a plate. An index on a parent says that row n depends on that parent's row n alone;
        f(...) stands for some function of its arguments.
    """
    return write(fold_loops(relations(story, *args, **kwargs)), math_text=True)


@with_symbols
def story_text(story: Any, *args: Any, **kwargs: Any) -> str:
    """The story as plain Unicode, sizes of the plates in the last line; arguments as for `story_lines`."""
    sites = fold_loops(relations(story, *args, **kwargs))
    lines = write(sites, math_text=False)
    letters = index_letters(plates_of(sites), sites)
    sizes = ", ".join(f"{letters[n].size} = {p.size}" for n, p in plates_of(sites).items())
    return "\n".join([*lines, *([f"where {sizes}"] if sizes else [])])


def write(sites: dict[str, Site], math_text: bool) -> list[str]:
    """Lines of sites whose loops are folded."""
    writer, rows = story_rows(sites, math_text)
    lines = writer.declarations()
    opened: tuple[Loop, ...] = ()
    for row in rows:
        same = 0
        while same < min(len(row.loops), len(opened)) and row.loops[same] == opened[same]:
            same += 1
        lines += ["    " * depth + row.loops[depth].heading(writer) for depth in range(same, len(row.loops))]
        opened = row.loops
        lines.append("    " * len(opened) + writer.dollars(row.text))
    return lines


@dataclass(frozen=True)
class Loop:
    """All values of one index: a plate, or the steps of a chain that read alike."""

    index: str
    first: int
    last: str
    plate: str = ""

    def heading(self, writer: "Writer") -> str:
        """``for $n$ in 1..$N$  data:``"""
        last = writer.dollars(self.last) if self.plate else self.last
        return f"for {writer.dollars(self.index)} in {self.first}..{last}{'  ' * bool(self.plate)}{self.plate}:"


@dataclass(frozen=True)
class Row:
    """One line of the story.

    Attributes
    ----------
    loops
        What it is repeated over, from the outermost in.
    text
        A formula without dollar signs.
    site
        The site it tells of; None for dots.
    step
        `Writer.step` while it speaks.
    """

    loops: tuple[Loop, ...]
    text: str
    site: Site | None = None
    step: tuple[Chain, str, int] | None = None


def story_rows(sites: dict[str, Site], math_text: bool) -> tuple["Writer", list[Row]]:
    """Every line of sites whose loops are folded, and who wrote them."""
    letters = index_letters(plates_of(sites), sites)
    writer = Writer(sites, letters, math_text)
    chains = find_chains(sites)
    chain_of = {name: chain for chain in chains for name in chain.place}
    used = {*used_words(sites.values()), *(x.index for x in letters.values())}
    rows: list[Row] = []
    written: set[int] = set()
    for name, site in sites.items():
        if site.kind in ("input", "parameter", "module"):
            continue
        chain = chain_of.get(name)
        if chain is None:
            rows.append(Row(writer.loops(site), writer.line(site), site))
        elif id(chain) not in written:
            written.add(id(chain))
            # Steps of time depend on each other; what does not is merely numbered.
            rows += _chain_rows(writer, chain, sites, spare_letter(used, "t" if chain.lagged else "j"))
    return writer, _name_functions(rows, sites)


def plates_of(sites: dict[str, Site]) -> dict[str, Plate]:
    """All plates of some sites, by name."""
    return {p.name: p for s in sites.values() for p in s.plates}


@dataclass
class Writer:
    """Writes formulas; `step` is (chain, letter, number) while a line speaks of step t of a chain."""

    sites: dict[str, Site]
    letters: dict[str, Letters]
    math_text: bool
    step: tuple[Chain, str, int] | None = field(default=None)

    def word(self, text: str) -> str:
        return upright(text) if self.math_text else text

    def dollars(self, text: str) -> str:
        return f"${text}$" if self.math_text else text

    def declarations(self) -> list[str]:
        """What is given and what is learned as a point."""
        lines = []
        for verb, kinds in (("given", ("input",)), ("learned", ("parameter", "module"))):
            names = [
                self.dollars(self.word(s.name) if s.kind == "module" else self.own(s))
                for s in self.sites.values()
                if s.kind in kinds
            ]
            lines += [f"{verb} {', '.join(names)}"] if names else []
        return lines

    def loops(self, site: Site) -> tuple[Loop, ...]:
        """The plates around a site."""
        found = ((self.letters[p.name], p.name) for p in site.plates)
        return tuple(Loop(letters.index, 1, letters.size, name) for letters, name in found)

    def own(self, site: Site) -> str:
        """A site with the indices of its plates."""
        return self.named(site.name, [self.letters[p.name].index for p in site.plates])

    def named(self, name: str, indices: Sequence[str]) -> str:
        joined = ["".join(indices)] if indices else []
        if self.step is not None and name in self.step[0].place:
            chain, t, now = self.step
            base, i = chain.place[name]
            return symbol(base, [t if i == now else f"{t}{i - now:+d}", *joined], self.math_text)
        return symbol(name, joined, self.math_text)

    def reference(self, name: str, user: Site) -> str:
        """A parent, indexed by the plates that row-by-row dependence was shown for."""
        return self.named(name, [self.letters[p].index for p in self.rows(name, user)])

    def rows(self, name: str, user: Site) -> list[str]:
        """Plates that a parent is indexed by."""
        parent = self.sites.get(name)
        if parent is None:
            return []
        shown = {p.name for p in parent.plates} if parent.kind == "input" else user.aligned
        own = [p.name for p in parent.plates if p.name in shown & {q.name for q in user.plates}]
        return own + [p.name for p in user.plates if (name, p.name) in user.along and p.name not in own]

    def is_row(self, expr: Expr, user: Site) -> bool:
        return isinstance(expr, Ref) and bool(self.rows(expr.name, user))

    def line(self, site: Site) -> str:
        """``x ~ Family(...)``, ``x = ...`` or a factor's term."""
        if site.kind == "factor":
            term, space = self.formula(site.arguments[0][1], site), r"\ " if self.math_text else " "
            exp = r"\exp" if self.math_text else "exp"
            return f"{self.own(site)}:{space}{self.word('factor')}{space}{exp}({term})"
        if site.family is None:
            value = site.arguments[0][1] if site.arguments else Opaque(frozenset(site.parents))
            return f"{self.own(site)} = {self.formula(value, site)}"
        relation = r"\sim" if self.math_text else "~"
        return f"{self.own(site)} {relation} {self.word(site.family)}({self.arguments(site)})"

    def arguments(self, site: Site) -> str:
        if not site.arguments:
            return ", ".join(self.reference(p, site) for p in site.parents)
        parts = []
        for name, expr in site.arguments:
            inverse = name == "precision_matrix"
            if inverse and isinstance(expr, Apply) and expr.op == "eye" and isinstance(expr.args[0], Number):
                expr, inverse = Apply("eye", (Number(1 / expr.args[0].value),)), False
            text, strength = self.term(expr, site)
            if name == "logits":
                text = f"{self.word('logits')} = {text}"
            elif inverse:
                text = self.power(text, strength, "-1")
            elif name == "scale_tril" and not isinstance(expr, Ref | Index):
                text = f"{self.word('scale_tril')} = {text}"
            elif name == "scale_tril":
                factor = self.wrap(text, strength, _PRODUCT)
                text = f"{factor} {self.power(text, strength, self.transposed)}"
            parts.append(text)
        return ", ".join(parts)

    @property
    def transposed(self) -> str:
        return r"\top" if self.math_text else "T"

    def formula(self, expr: Expr, user: Site) -> str:
        return self.term(expr, user)[0]

    def wrap(self, text: str, strength: int, needed: int) -> str:
        return text if strength >= needed else f"({text})"

    def power(self, text: str, strength: int, exponent: str) -> str:
        text = self.wrap(text, strength, _ATOM)
        if self.math_text:
            return f"{text}^{{{exponent}}}"
        if exponent == "T":
            return f"{text}ᵀ"
        return f"{text}^{exponent}" if exponent.isalnum() else f"{text}^({exponent})"

    def term(self, expr: Expr, user: Site) -> tuple[str, int]:
        """A formula and how strongly it binds."""
        if isinstance(expr, Ref):
            return self.reference(expr.name, user), _ATOM
        if isinstance(expr, Number):
            text = number(expr.value, self.math_text)
            return text, _ATOM if expr.value >= 0 and "cdot" not in text else _SUM
        if isinstance(expr, Listing):
            dots = [r"\ldots" if self.math_text else "…"] if expr.more else []
            shown = [number(v, self.math_text) for v in expr.shown]
            text = ", ".join([*shown[:-1], *dots, shown[-1]])
            return (text if expr.bare else f"({text})"), _ATOM
        if isinstance(expr, Index):
            return self.indexed(expr, user), _ATOM
        if isinstance(expr, Opaque):
            return self.function(expr, user), _ATOM
        return self.applied(expr, user)

    def indexed(self, expr: Index, user: Site) -> str:
        whole = r"\cdot" if self.math_text else ":"
        items = [whole if i is None else self.formula(i, user) for i in expr.items]
        base = symbol(expr.base.name, (), self.math_text) if isinstance(expr.base, Ref) else None
        if isinstance(expr.base, Ref) and self.step is not None and expr.base.name in self.step[0].place:
            base = self.named(expr.base.name, ())
        base = base or self.wrap(*self.term(expr.base, user), _ATOM)
        if not self.math_text:
            return f"{base}[{', '.join(items)}]"
        if "_{" in base:
            return f"{base[:-1]},{','.join(items)}}}" if base.endswith("}") else f"({base})_{{{','.join(items)}}}"
        return subscripted(base, items, True)

    def function(self, expr: Opaque, user: Site) -> str:
        order = [n for n in self.sites if n in expr.names]
        networks = [n for n in order if self.sites[n].kind == "module"]
        # What differs from row to row though nothing with rows enters is a function of the row itself: f_n.
        told = {p.name for n in user.parents if n in self.sites for p in self.sites[n].plates} | {
            p for _, p in user.along
        }
        rows = [self.letters[p.name].index for p in user.plates if p.name in user.varying and p.name not in told]
        marks = [*(self.word(n) for n in networks), *(["".join(rows)] if rows else [])]
        name = subscripted(_FUNCTION, marks, self.math_text)
        values = [self.reference(n, user) for n in order if n not in networks]
        if not order:
            return r"\cdot" if self.math_text else "·"
        return f"{name}({', '.join(values)})"

    def applied(self, expr: Apply, user: Site) -> tuple[str, int]:
        op = expr.op
        if op == "matmul" and isinstance(expr.args[1], Apply) and expr.args[1].op == "T":
            row, matrix = expr.args[0], expr.args[1].args[0]
            if self.is_row(row, user):  # rows of data times a transposed matrix: as vectors, W z_n
                pair = ("dot", (row, matrix)) if self.is_row(matrix, user) else ("matmul", (matrix, row))
                return self.applied(Apply(*pair), user)
        terms = [self.term(a, user) for a in expr.args]
        (left, strong), (right, also) = terms[0], terms[-1]
        if op in ("add", "sub"):
            return f"{left} {'+' if op == 'add' else '-'} {self.wrap(right, also, _PRODUCT)}", _SUM
        if op in ("mul", "matmul"):
            if op == "mul" and isinstance(expr.args[1], Number) and not isinstance(expr.args[0], Number):
                (left, strong), (right, also) = terms = terms[::-1]  # numbers come first
            if op == "mul" and "1" in (left, right):
                return terms[0] if right == "1" else terms[-1]
            words = any("\\mathrm" in t.split("_{")[0] for t in (left, right))
            between = (r" \cdot " if words else r"\,") if self.math_text else "·"
            return f"{self.wrap(left, strong, _PRODUCT)}{between}{self.wrap(right, also, _PRODUCT)}", _PRODUCT
        if op == "div":
            return f"{self.wrap(left, strong, _PRODUCT)} / {self.wrap(right, also, _POWER)}", _PRODUCT
        if op == "dot":
            between = r"\," if self.math_text else " "
            return (
                f"{self.power(left, strong, self.transposed)}{between}{self.wrap(right, also, _POWER)}",
                _PRODUCT,
            )
        if op == "pow":
            return self.power(left, strong, right), _POWER
        if op in _POWERS:
            return self.power(left, strong, _POWERS[op]), _POWER
        if op == "T":
            return self.power(left, strong, self.transposed), _POWER
        if op == "neg":
            return f"-{self.wrap(left, strong, _PRODUCT)}", _SUM
        if op == "eye":
            return ("" if left == "1" else left + (r"\," if self.math_text else "·")) + "I", _PRODUCT
        if op == "stack":
            return f"({', '.join(t for t, _ in terms)})", _ATOM
        if self.math_text and op == "sqrt":
            return rf"\sqrt{{{left}}}", _POWER
        if op == "abs":
            return f"|{left}|", _ATOM
        if op == "norm":
            return (rf"\|{left}\|" if self.math_text else f"‖{left}‖"), _ATOM
        if self.math_text and op in ("exp", "log", "tanh", "sin", "cos"):
            return rf"\{op}({left})", _ATOM
        return f"{self.word(op)}({left})", _ATOM


def _chain_rows(writer: Writer, chain: Chain, sites: dict[str, Site], time: str) -> list[Row]:
    """First steps one by one, then one round for all steps that read alike."""
    rounds: dict[int, list[tuple[Site, str]]] = {}
    for name, (_, i) in sorted(chain.place.items(), key=lambda item: list(sites).index(item[0])):
        writer.step = (chain, time, i)
        rounds.setdefault(i, []).append((sites[name], writer.line(sites[name])))
    writer.step = None
    alike = chain.last
    read = {i: [line for _, line in lines] for i, lines in rounds.items()}
    while alike > chain.first and read.get(alike - 1) == read[chain.last]:
        alike -= 1
    general = chain.last - alike >= 1
    singles = list(range(chain.first, alike if general else chain.last + 1))
    rows: list[Row] = []
    for i in singles if len(singles) <= 3 else (*singles[:2], singles[-1]):
        if len(singles) > 3 and i == singles[-1]:
            rows.append(Row(rows[-1].loops, r"\ldots" if writer.math_text else "…"))
        rows += [Row(writer.loops(site), writer.line(site), site) for site, _ in rounds[i]]
    if general:
        steps = Loop(time, alike, str(chain.last))
        speaking = (chain, time, chain.last)
        rows += [Row((*writer.loops(site), steps), line, site, speaking) for site, line in rounds[chain.last]]
    return rows


def _name_functions(rows: list[Row], sites: dict[str, Site]) -> list[Row]:
    """f, g, h, f_1, ... : two functions are two letters."""
    used = used_words(sites.values())
    names = [c for c in "fgh" if c not in used]
    result, count = [], 0
    for row in rows:
        text = row.text
        while _FUNCTION in text:
            free = count < len(names)
            base = names[count] if free else f"{names[0] if names else 'fun'}{count - len(names) + 1}"
            text = text.replace(_FUNCTION, base, 1)
            count += 1
        result.append(replace(row, text=text))
    return result

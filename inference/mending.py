"""Errors of PyTorch's in a story are told again in the story's words: where, with which shapes, and how to mend them.

Only errors that PyTorch or Pyro raise while the story runs are retold; what a story raises itself passes through.
"""

import dis
import linecache
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from .guard import out_of_memory

if TYPE_CHECKING:
    from .shapes import Record
    from .structure import Structure

#: What a mistake in a story may raise.
MISTAKES = (RuntimeError, IndexError, TypeError, ValueError)
_FOREIGN = (str(Path(torch.__file__).parent), str(Path(pyro.__file__).parent))
_BESIDE = tuple(str(Path(torch.__file__).parents[1] / name) for name in ("numpy", "scipy", "sklearn", "tqdm"))
_OURS = str(Path(__file__).parent)
#: What is told by `rehearsal`, which mends or names it for all data.
_ELSEWHERE = ("dtype", "scalar type", "device")
#: Where PyTorch calls modes and kinds of tensors of other libraries: what they do is no line of a story.
_BELOW = ("__torch_function__", "__torch_dispatch__")


class StoryError(ValueError):
    """A story that cannot be run: where it stops, what it had sampled, and the line that mends it."""


def retold(error: Exception, records: Mapping[str, "Record"], given: Mapping[str, Any]) -> StoryError | None:
    """The error in the story's words.

    Parameters
    ----------
    error
        What stopped the run.
    records, given
        Sites that had been sampled by then, and arguments of the story.

    Returns
    -------
    The error to raise instead, or None where the story itself raised it, or it tells of dtypes or devices.
    """
    if raised_here(error):
        return None
    while isinstance(error.__cause__, MISTAKES):  # Pyro appends its table of shapes to a copy
        error = error.__cause__
    text = str(error).split("\n")[0].strip()
    if out_of_memory(error) is not None:
        return None
    place = story_frame(error.__traceback__)
    if place is None or isinstance(error, StoryError) or any(word in text for word in _ELSEWHERE):
        return None
    file, number = place
    line = statement(file, number)
    named = re.search(r"sample\(\s*f?[\"']([^\"']+)", line)
    at = f" at site {named.group(1)!r}" if named else f" after site {list(records)[-1]!r}" if records else ""
    said = text.split(", but found")[0].rstrip(".")
    told = [f"the story stops{at}, in line {number} of {Path(file).name}:", f"    {line}", f"  {said}."]
    told += picture(records, given)
    told += [f"  {hint}" for hint in mend(text, line, records, given)]
    return StoryError("\n".join(told))


def raised_here(error: Exception) -> bool:
    """Whether this package raised the error, in words of its own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OURS)


def known(structure: "Structure") -> dict[str, "Record"]:
    """Sites of a story that has been inspected, as records of their shapes."""
    from .shapes import Record

    return {
        s.name: Record(
            s.name, s.kind, s.family, s.shape, s.event_shape, s.plates, tuple(structure.plates[p] for p in s.plates)
        )
        for s in structure.sites
    }


def story_frame(trace: TracebackType | None) -> tuple[str, int] | None:
    """File and line of the innermost statement of the story; None where that statement raised the error itself."""
    frames = []
    while trace is not None and trace.tb_frame.f_code.co_name not in _BELOW:
        frames.append((trace.tb_frame.f_code, trace.tb_lasti, trace.tb_lineno))
        trace = trace.tb_next
    own = [f for f in frames if not f[0].co_filename.startswith((*_FOREIGN, *_BESIDE, _OURS, "<eval_with_key>"))]
    if not own:
        return None
    code, last, _ = frames[-1]
    foreign = code.co_filename.startswith(_FOREIGN)
    if not foreign and (code.co_filename.startswith(_OURS) or code.co_code[last] == dis.opmap["RAISE_VARARGS"]):
        return None
    return own[-1][0].co_filename, own[-1][2]


def statement(file: str, number: int) -> str:
    """The line of the story, with what follows while brackets are open."""
    line = linecache.getline(file, number).strip()
    for more in range(1, 6):
        if line.count("(") <= line.count(")"):
            break
        line += " " + linecache.getline(file, number + more).strip()
    return line.split("  #")[0] or "(its source is not at hand)"


def in_words(r: "Record") -> str:
    """In which plates a value lies, and what one event of it is."""
    plates = ", ".join(f"plate {p!r} of size {n}" for p, n in zip(r.plates, r.plate_sizes)) or "no plate"
    return f"in {plates}, one event {r.event_shape}"


def picture(records: Mapping[str, "Record"], given: Mapping[str, Any]) -> list[str]:
    """The plates in words: a line for each argument and each site so far."""
    rows = [(n, tuple(v.shape), "given") for n, v in given.items() if isinstance(v, Tensor)]
    rows += [(n, r.shape, in_words(r)) for n, r in records.items() if r.kind in ("latent", "observed")]
    if not rows:
        return []
    wide, long = max(len(r[0]) for r in rows), max(len(str(r[1])) for r in rows)
    return ["  so far:", *(f"    {name:<{wide}}  {shape!s:<{long}}  {words}" for name, shape, words in rows[:12])]


def mend(text: str, line: str, records: Mapping[str, "Record"], given: Mapping[str, Any]) -> list[str]:
    """The offending dimension and the line that mends it."""
    for pattern, answer in HINTS:
        found = re.search(pattern, text)
        if found:
            return answer(found, line, records, given)
    return []


def _named(shape: tuple[int, ...], records: Mapping[str, "Record"], given: Mapping[str, Any], other: str) -> str:
    """The one argument or site of that shape."""
    shapes = {n: tuple(v.shape) for n, v in given.items() if isinstance(v, Tensor)}
    shapes |= {n: r.shape for n, r in records.items()}
    names = [n for n, s in shapes.items() if s == shape]
    return names[0] if len(names) == 1 else other


def _product(found: re.Match, line: str, records: Mapping[str, "Record"], given: Mapping[str, Any]) -> list[str]:
    a, b, c, d = map(int, found.groups())
    first, second = _named((a, b), records, given, "first"), _named((c, d), records, given, "second")
    told = [f"offending: the last dimension of {first} {(a, b)} is {b}, the first of {second} {(c, d)} is {c}."]
    rows = {n for r in records.values() for n in r.plate_sizes} | {len(v) for v in given.values() if hasattr(v, "ndim")}
    if b == d and c in rows and a not in rows:
        return [*told, f"mend: rows come first: {second} @ {first}.mT, {(c, d)} times {(b, a)} makes {(c, a)}"]
    if b == d:
        return [*told, f"mend: {first} @ {second}.mT, {(a, b)} times {(d, c)} makes {(a, c)}"]
    if a == c:
        return [*told, f"mend: {first}.mT @ {second}, {(b, a)} times {(c, d)} makes {(b, d)}"]
    return [*told, f"mend: make the two lengths equal, {b} and {c}"]


def _broadcast(found: re.Match, line: str, records: Mapping[str, "Record"], given: Mapping[str, Any]) -> list[str]:
    a, b, dim = map(int, found.groups())
    sizes = {n: p for r in records.values() for p, n in zip(r.plates, r.plate_sizes)}
    told = [f"offending: dimension {dim} has {a} entries in one value and {b} in the other."]
    if a in sizes and b in sizes and sizes[a] != sizes[b]:
        first, second = sizes[a], sizes[b]
        return [
            *told,
            f"plates {first!r} and {second!r} cross, and both lie on dimension -1; each needs a dimension of its own.",
            f'mend: {first}, {second} = pyro.plate("{first}", {a}, dim=-2), pyro.plate("{second}", {b}, dim=-1), made once,',
            f"      then `with {first}:` and so on; {(a, 1)} meets {(b,)} and makes {(a, b)}",
        ]
    return [*told, "mend: make the lengths equal, or give one of them a dimension of its own: value.unsqueeze(-1)"]


def _fixed(*told: str) -> Callable[..., list[str]]:
    return lambda found, line, records, given: [t.format(*found.groups()) for t in told]


def _branch(found: re.Match, line: str, records: Mapping[str, "Record"], given: Mapping[str, Any]) -> list[str]:
    return [
        "offending: Python's if, int() and float() want one number, and a latent stands for many at once: one a row of",
        "its plate, or all its states where it is summed out.",
        "mend: torch.where(z > 0, a, b) instead of `a if z else b`, table[z.long()] instead of table[int(z)]",
    ]


def _support(found: re.Match, line: str, records: Mapping[str, "Record"], given: Mapping[str, Any]) -> list[str]:
    name, family, wanted = found.groups()
    told = [f"offending: {name} of {family} must satisfy {wanted}, and depends on a draw that does not."]
    if wanted.startswith("GreaterThan"):
        return [
            *told,
            f"mend: draw {name} from a positive distribution (LogNormal, HalfNormal, Gamma), or use its .exp()",
        ]
    return [*told, f"mend: a prior for {name} whose support is {wanted}"]


def _bounds(found: re.Match, line: str, records: Mapping[str, "Record"], given: Mapping[str, Any]) -> list[str]:
    index = f"index {found.group(1)}" if found.group(1) else "an index"
    finite = [name for name, r in records.items() if r.discrete and r.kind == "latent"]
    whole = [
        name
        for name, v in given.items()
        if hasattr(v, "dtype") and "int" in str(v.dtype) and re.search(rf"\b{name}\b", line)
    ]
    if whole and not any(re.search(rf"\b{name}\b", line) for name in finite):
        return [
            f"offending: {index} lies beyond the end of the table: {whole[0]!r} goes up to {int(given[whole[0]].max())}.",
            f"mend: number {whole[0]} from 0, and make the table's plate as large as the greatest label plus one",
        ]
    return [
        f"offending: {index} lies beyond the end of the table: a latent has more states than there are components.",
        "mend: give the Categorical and the plate of components the same number K",
    ]


def _columns(found: re.Match, line: str, records: Mapping[str, "Record"], given: Mapping[str, Any]) -> list[str]:
    column = re.search(r"\b(\w+)\[[\"'](\w+)[\"']\]", line)
    if column is None or column.group(1) not in given:
        return []
    name = column.group(1)
    return [
        f"offending: a story is given tensors, and {name!r}, now of shape {tuple(given[name].shape)}, has no columns by name.",
        f"mend: make columns the arguments, such as `def story(dose, arm, cured=None)`, and fit(story, {name})",
    ]


def _dimensions(found: re.Match, line: str, records: Mapping[str, "Record"], given: Mapping[str, Any]) -> list[str]:
    return _columns(found, line, records, given) or [
        f"offending: the indexed value has {found.group(1)} dimensions, no one for the components.",
        'mend: sample one value for each component, inside `with pyro.plate("components", K):`',
    ]


#: What PyTorch says, and what a teller of stories should hear.
HINTS: tuple[tuple[str, Callable[..., list[str]]], ...] = (
    (r"shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)", _product),
    (
        r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\) at non-singleton dimension (\d+)",
        _broadcast,
    ),
    (r"Boolean value of Tensor|only one element tensors|cannot be converted to Scalar", _branch),
    (r"Expected parameter (\w+) .*of distribution (\w+)\(.*satisfy the constraint (.+?), but", _support),
    (
        r"tensors used as indices must be",
        _fixed("offending: Bernoulli and Poisson draw floats, an index is a whole number.", "mend: table[z.long()]"),
    ),
    (
        r"too many indices for tensor of dimension (\d+)",
        _dimensions,
    ),
    (r"invalid data type 'str'|only integers, slices", _columns),
    (r"index (\d+) is out of bounds|index out of range()", _bounds),
    (
        r"reinterpreted_batch_ndims <= len\(base_distribution.batch_shape\), actual (\d+) vs (\d+)",
        _fixed(
            "offending: `.to_event({0})` binds {0} dimensions, and the distribution has {1} outside of its own event.",
            "mend: bind {1}, which for 0 means: leave `.to_event` out (MultivariateNormal and Dirichlet are vectors already)",
        ),
    ),
    (
        r"duplicate plate '(.+?)'|collide at dim=(-?\d+)",
        _fixed(
            "offending: one plate stands inside another on the same dimension: every row would hold all rows.",
            "mend: move the inner statement to the outer plate, or give the plates two names and dimensions (dim=-1, dim=-2)",
        ),
    ),
)

"""Names as a lecture writes them: pi becomes π, mu_0 gets a subscript, plates get an index and a size."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_LOWER = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu "
    "nu xi pi rho sigma tau upsilon phi chi psi omega"
).split()
_UPPER = "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega".split()
_UNICODE = dict(zip(_LOWER, "αβγδεζηθικλμνξπρστυφχψω", strict=True)) | dict(zip(_UPPER, "ΓΔΘΛΞΠΣΥΦΨΩ", strict=True))
# `lambda` is a keyword of Python, so programs write it otherwise.
_ALIASES = {"lam": "lambda", "lamda": "lambda", "lambd": "lambda", "eps": "epsilon"}
_LETTERS = {
    "data": "n", "rows": "n", "observations": "n", "components": "k", "clusters": "k", "topics": "k",
    "states": "k", "factors": "k", "documents": "d", "docs": "d", "features": "d", "dimensions": "d",
    "words": "n", "tokens": "n", "time": "t", "steps": "t", "groups": "j", "schools": "j", "items": "i",
    "users": "u", "sequences": "s",
}  # fmt: skip

# What the story at hand calls its sites and plates, beyond their names.
_OWN: ContextVar[Mapping[str, str]] = ContextVar("symbols")


@contextmanager
def own_symbols(story: Any) -> Iterator[None]:
    """Within, names are written as `story.symbols` has them: ``{"weights": "pi", "centres": "mu", "data": "i"}``.

    Raises
    ------
    TypeError
        `symbols` is no mapping from names to names.
    """
    owner = getattr(story, "__self__", story)
    found = getattr(owner, "symbols", None)
    found = {} if found is None or callable(found) else found
    if not isinstance(found, Mapping) or not all(isinstance(w, str) and w for pair in found.items() for w in pair):
        raise TypeError(
            f"symbols of the story must map names of sites and plates to names such as 'pi' or 'mu_0', got {found!r}"
        )
    token = _OWN.set(found)
    try:
        yield
    finally:
        _OWN.reset(token)


def with_symbols(function: Callable[P, R]) -> Callable[P, R]:
    """A function of a story that writes names as the story wants them."""

    @functools.wraps(function)
    def speaking(*args: P.args, **kwargs: P.kwargs) -> R:
        with own_symbols(args[0] if args else kwargs.get("story")):
            return function(*args, **kwargs)

    return speaking


def spoken(name: str) -> str:
    """What a site or plate is called: "weights" is "pi" where the story says so, and "weights_3" is "pi_3"."""
    own = _OWN.get({})
    base, divider, number = name.rpartition("_")
    if name not in own and divider and number.isdigit() and base in own:
        return f"{own[base]}_{number}"
    return own.get(name, name)


def is_symbol(word: str) -> bool:
    """Whether a word is one mathematical letter."""
    return len(word) == 1 or _ALIASES.get(word, word) in _UNICODE


def _escape(text: str) -> str:
    text = re.sub(r"\\", r"\\backslash ", text).replace("^", r"\wedge ")
    return re.sub(r"([\$_{}%#&~])", r"\\\1", text).replace(" ", r"\ ").replace(".", r".\!")


def letter(word: str, math_text: bool) -> str:
    """One word as a symbol, upright if it is longer than a letter."""
    word = _ALIASES.get(word, word)
    if not math_text:
        return _UNICODE.get(word, word)
    if word in _UNICODE:
        return rf"\{word}" if word != "epsilon" else r"\varepsilon"
    if (len(word) == 1 and word.isalpha()) or word.isdigit():
        return word
    return upright(word)


def upright(text: str) -> str:
    """Words as they are, in mathtext."""
    return rf"\mathrm{{{_escape(text)}}}"


def symbol(name: str, indices: Sequence[str] = (), math_text: bool = True) -> str:
    """A name with its own subscripts and further, already written ones.

    Parameters
    ----------
    name
        Name of a site: "pi", "mu_0", "log_sigma", "school effect".
    indices
        Written subscripts, for example "n" or "t-1".
    math_text
        Mathtext without dollar signs (True) or plain Unicode (False).
    """
    name = spoken(name)
    base, *tail = name.split("_") if name.strip("_") else [name]
    if base == "log" and tail and is_symbol(tail[0]):
        inner = symbol("_".join(tail), indices, math_text)
        return rf"\log\,{inner}" if math_text else f"log {inner}"
    digits = re.fullmatch(r"([^\W\d_]+)(\d+)", base)
    if digits:
        base, tail = digits[1], [digits[2], *tail]
    if not is_symbol(base):
        words = [base, *(t for t in tail if not t.isdigit())]
        base, tail = " ".join(w for w in words if w) or name, [t for t in tail if t.isdigit()]
    return subscripted(letter(base, math_text), [*(letter(t, math_text) for t in tail if t), *indices], math_text)


def subscripted(base: str, subscripts: Sequence[str], math_text: bool) -> str:
    """`base` with subscripts."""
    if not subscripts:
        return base
    joined = ",".join(subscripts)
    if math_text:
        return f"{base}_{{{joined}}}"
    return f"{base}_{joined}" if joined.isalnum() else f"{base}_{{{joined}}}"


def number(value: float, math_text: bool) -> str:
    """Three significant digits, whole numbers in full up to a million."""
    if math.isnan(value):
        return r"\mathrm{nan}" if math_text else "nan"
    if math.isinf(value):
        sign = "-" if value < 0 else ""
        return sign + (r"\infty" if math_text else "∞")
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    text = f"{value:.3g}"
    if "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    power = str(int(exponent))
    if not math_text:
        return f"{mantissa}e{power}"
    return rf"10^{{{power}}}" if mantissa == "1" else rf"{mantissa}\cdot 10^{{{power}}}"


@dataclass(frozen=True)
class Letters:
    """How a plate is counted: index n of 1..N."""

    index: str
    size: str


def index_letters(plates: Iterable[str], names: Iterable[str]) -> dict[str, Letters]:
    """An index and a size for each plate, none of them a site's own symbol.

    Parameters
    ----------
    plates
        Names of the plates; earlier ones choose first, "data" before all.
    names
        Names of the sites.
    """
    taken = {re.split(r"[_\d]", spoken(n))[0] for n in names}
    found: dict[str, Letters] = {}
    plates = list(dict.fromkeys(plates))
    for plate in sorted(plates, key=lambda p: (p != "data", plates.index(p))):
        first = [c for c in plate.lower() if c.isascii() and c.isalpha()][:1]
        own = spoken(plate) if len(spoken(plate)) == 1 and spoken(plate) != plate else ""
        wanted = [own, _LETTERS.get(plate.lower(), ""), *first, *"ijklmnrsabcdghopquvw"]
        free = (c for c in wanted if c and c not in taken and c.upper() not in taken and c not in "ef")
        index = next(free, None) or f"i{len(found)}"
        taken |= {index, index.upper()}
        found[plate] = Letters(index, index.upper())
    return {p: found[p] for p in plates}


def spare_letter(used: Iterable[str], wanted: str = "t") -> str:
    """A letter that nothing else is called."""
    used = set(used)
    return next((c for c in (*wanted, *"tsrijklm") if c not in used and c.upper() not in used), "t'")

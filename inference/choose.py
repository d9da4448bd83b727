"""Which inference is valid for a story, and why: pure rules over its `Structure`."""

from dataclasses import dataclass, field
from typing import Any

from .crowds import crowded
from .methods import METHODS, resolve
from .methods.base import Method, Verdict, one_of
from .structure import Structure

#: Numbers in the data beyond which sampling is not the first thing to try.
LARGE_DATA = 5_000_000
WANTS = ("auto", "posterior", "point")


@dataclass(frozen=True)
class Choice:
    """The method that will run, the rule that chose it, and every method's verdict with its premise."""

    method: Method
    rule: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.method.name}: {self.rule}"]
        for name, verdict in self.verdicts.items():
            mark = "admissible" if verdict.applies else "rejected"
            lines.append(f"  {name:<5} {mark:<10}  {verdict.reason}")
        return "\n".join(lines)


class NoMethodError(ValueError):
    """No method is valid for the story."""


def verdicts(structure: Structure) -> dict[str, Verdict]:
    """Every method's opinion."""
    return {name: method.check(structure) for name, method in METHODS.items()}


def choose(structure: Structure, want: str = "auto", *, slow: dict[str, str] | None = None) -> Choice:
    """The first rule that holds.

    0. the posterior is known in closed form, and points were not asked for -> exact
    1. a topic model -> EM on expected counts, or SVI by natural gradients for want="posterior"
    2. want="point", or finite locals can be summed out and points for the globals are enough -> EM, unless it would set about
       as many unknowns at once as there are data, beside a scale that they share (`crowded`)
    3. continuous latents and data in memory, at a bearable cost -> NUTS
    4. otherwise (large data, continuous locals in numbers, networks) -> SVI

    Parameters
    ----------
    structure
        From `inspect`.
    want
        "posterior": distributions over the globals too; "point": points are enough; "auto": EM where it is exact for
        the locals, else a posterior.
    slow
        Methods that a pilot run found too costly, with the measured reason; they stay admissible on request.

    Raises
    ------
    NoMethodError
        No method is admissible; the message gives every reason.
    """
    one_of("choose", "want", want, WANTS)
    opinions, slow = verdicts(structure), slow or {}
    large = structure.data_bytes / structure.itemsize > LARGE_DATA

    def valid(name: str) -> bool:
        return opinions[name].applies

    if want != "point" and valid("exact"):
        return Choice(METHODS["exact"], opinions["exact"].reason, opinions)
    if structure.admixture:
        name = "svi" if want == "posterior" else "em"
        why = "a distribution over them is asked for" if want == "posterior" else "points for the topics are enough"
        return Choice(METHODS[name], f"a topic model, and {why} (want={want!r})", opinions)
    finite_locals = [s.name for s in structure.finite if s.local]
    crowd = crowded(structure) if valid("em") else ""
    if want != "posterior" and valid("em") and not crowd and (want == "point" or structure.finite):
        summed = finite_locals or [s.name for s in structure.finite]
        what = ", ".join([*summed[:4], "..."] if len(summed) > 4 else summed) or "no latent"
        verb = "is" if len(summed) < 2 else "are"
        why = f"{what} {verb} summed out exactly and points are enough for the globals (want={want!r})"
        return Choice(METHODS["em"], why, opinions)
    if valid("nuts") and not large and "nuts" not in slow:
        why = "the globals are continuous, the data are in memory, and draws promise the most"
        return Choice(METHODS["nuts"], why + (f"; {crowd}" if crowd and want == "point" else ""), opinions)
    if valid("svi") and structure.guideless and not structure.has_guide:
        return Choice(METHODS["svi"], opinions["svi"].reason, opinions)
    if valid("svi"):
        because = slow.get("nuts") or ("the data are large" if large and valid("nuts") else None)
        because = because or f"NUTS does not apply ({opinions['nuts'].reason})"
        return Choice(METHODS["svi"], f"a variational posterior, since {because}", opinions)
    for name in ("nuts", "em"):
        if valid(name):
            return Choice(METHODS[name], f"the only admissible method: {opinions[name].reason}", opinions)
    reasons = "\n".join(f"  {name:<5} {v.reason}" for name, v in opinions.items())
    raise NoMethodError(f"no method is valid for this story:\n{reasons}")


def check_request(structure: Structure, method: Any) -> Choice:
    """The user's method, or the reason why it is refused.

    Raises
    ------
    NoMethodError
        The method is not valid for the story; admissible ones are listed.
    """
    chosen = resolve(method)
    verdict = chosen.check(structure)
    opinions = {**verdicts(structure), chosen.name: verdict}
    if not verdict.applies:
        others = [name for name, v in opinions.items() if v.applies]
        advice = f"admissible: {', '.join(others)}" if others else "no method is valid for this story"
        raise NoMethodError(f"method {chosen.name!r} is not valid for this story: {verdict.reason}. {advice}")
    return Choice(chosen, f"as asked; {verdict.reason}", opinions)

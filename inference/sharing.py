"""What each of several ranks is given to work on: its share of one table, rows that it brought itself, or everything."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .data import take_rows
from .distributed import Ranks

if TYPE_CHECKING:
    from .methods.base import Method
    from .problem import Problem
    from .structure import Site, Structure

#: Rows of a table that tell whether two ranks hold the same.
PRINT_ROWS = 64


def shared_out(problem: Problem, ranks: Ranks, method: Method) -> Problem:
    """The same problem as one rank works on it.

    Parameters
    ----------
    method
        What it shares out is its `spreads`: "rows", "chains", or "nothing". `unshareable(structure)`, if it has that, tells why
        it cannot.

    Raises
    ------
    ValueError
        ranks="split", and the ranks were given different data; ranks="own", and rows cannot be shared or do not fit.
    """
    if not ranks.several:
        return problem
    ranks = replace(ranks, device=problem.device)
    against = unshareable(problem, method, ranks.share)
    if ranks.share == "own":
        if against:
            raise ValueError(
                f"ranks='own': {against}; give every rank the same data and pass ranks='split', or ranks='alone'"
            )
        return own_rows(problem, ranks)
    prints = ranks.gather(table_print(problem))
    if any(p != prints[0] for p in prints):
        raise ValueError(
            f"the ranks were given different data (shapes {[p[0] for p in prints]}): with ranks='split' every rank is given "
            f"the whole table and works on its share; where each brings rows of its own, pass ranks='own'"
        )
    rows = problem.structure.num_rows or 0
    if getattr(method, "spreads", "nothing") == "chains":
        return replace(problem, ranks=ranks)
    if against or rows < ranks.size:
        return problem  # every rank does the same work
    base, more = divmod(rows, ranks.size)
    ranks = replace(ranks, counts=tuple(base + (r < more) for r in range(ranks.size)))
    mine = slice(ranks.offset, ranks.offset + ranks.counts[ranks.rank])
    cut = problem.over(take_rows(problem.kwargs, problem.structure.row_arguments, mine))
    sites = tuple(fewer_rows(s, cut.structure, rows) for s in cut.structure.sites)
    return replace(cut, structure=replace(cut.structure, sites=sites, _by_name={}), ranks=ranks)


def same_call(others: Ranks, call: str, **said: Any) -> None:
    """Refuse, on every rank, what the ranks were not asked alike: they would wait for different messages.

    Parameters
    ----------
    call
        Name of the function.
    said
        Its arguments, but for the data: values, and stories and methods, which count by their names and settings.

    Raises
    ------
    ValueError
        An argument differs; every value is listed with its rank.
    """
    if not others.several:
        return
    card = {"call": call}
    for name, value in said.items():
        card[name] = type(value).__name__ if is_method(value) else in_words(value)
        card |= {f"{name}.{n}": in_words(v) for n, v in options_of(value).items()} if is_method(value) else {}
    cards = others.gather(card)
    if any(card["call"] != cards[0]["call"] for card in cards):
        told = [f"rank {r} calls {card['call']}" for r, card in enumerate(cards)]
        raise ValueError(
            f"the ranks do not call the same function: {', '.join(told)}; run the same script on every rank"
        )
    different = [n for n in cards[0] if any(card.get(n, cards[0][n]) != cards[0][n] for card in cards)]
    if different:
        told = [
            f"{n}: " + ", ".join(f"{short(card.get(n, 'none'))} on rank {r}" for r, card in enumerate(cards))
            for n in different
        ]
        raise ValueError(
            f"the ranks call {call} with different arguments, and would wait for each other for ever: {'; '.join(told)}. Pass "
            f"the same on every rank; data alone may differ, with ranks='own'"
        )


def is_method(value: Any) -> bool:
    """Whether it is a configured method."""
    return is_dataclass(value) and hasattr(value, "run")


def options_of(method: Any) -> dict[str, Any]:
    """What the answer of a method depends on; files, starts and callbacks may be each rank's own."""
    return {f.name: getattr(method, f.name) for f in fields(method) if f.compare and f.init}


def in_words(value: Any) -> str:
    """A value so that two ranks can compare it: no addresses, and of a method what its answer depends on."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {in_words(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_words, value))}]"
    if is_method(value):
        return f"{type(value).__name__}({', '.join(f'{n}={in_words(v)}' for n, v in options_of(value).items())})"
    if isinstance(value, Tensor | np.ndarray):  # held-out rows, of which every rank may have its own
        return f"an array with rows of shape {tuple(value.shape[1:])}"
    text = getattr(value, "__qualname__", None) or repr(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def short(text: str) -> str:
    """As much of it as fits a message."""
    return text if len(text) <= 200 else f"{text[:197]}..."


def fewer_rows(site: Site, structure: Structure, rows: int) -> Site:
    """A site of a story of `rows` rows as it is where `structure` has fewer."""
    if structure.data_plate not in site.plates:
        return site
    batch = list(site.shape[: len(site.shape) - len(site.event_shape)])
    at = site.plates.index(structure.data_plate)
    at = at if len(batch) == len(site.plates) else batch.index(rows) if rows in batch else -1
    if at < 0 or not batch or batch[at] != rows:
        return site
    batch[at] = structure.num_rows or 1
    return replace(site, shape=(*batch, *site.shape[len(batch) :]))


def unshareable(problem: Problem, method: Method, share: str = "split") -> str:
    """Why ranks cannot hold rows apart; empty where they can."""
    structure = problem.structure
    if getattr(method, "spreads", "nothing") != "rows":
        return f"{method.name} does not share out rows"
    if text := getattr(method, "unshareable", lambda structure: "")(structure):
        return text
    if not structure.row_arguments or not structure.num_rows:
        return "no argument of the story has one entry a row on its first axis"
    if shared := [s.name for s in structure.finite if not s.local]:
        return f"rows share the finite latent {shared[0]!r}, which is summed out over all of them at once"
    outside = [s.name for s in (*structure.observed, *structure.unnormalised) if structure.data_plate not in s.plates]
    if outside:
        return f"site {outside[0]!r} is seen outside the rows"
    rows = structure.num_rows  # networks may be told of inside the plate, and are nobody's rows
    if by_row := [s.name for s in structure.learned if s.local and s.shape[:1] == (rows,)]:
        return f"the parameter {by_row[0]!r} has a value a row"
    if problem.admixture is not None and not shares_documents(problem, method, share):
        return "topic models are fitted on the expected counts of all documents"
    return ""


def shares_documents(problem: Problem, method: Method, share: str) -> bool:
    """Whether documents are let go after every visit, so that each rank may visit its own.

    So it is where the ranks brought their own, where a corpus lies on disk, and where EM is asked for it by its driver.
    """
    if problem.admixture.walk is not None or method.name not in ("em", "svi"):
        return False
    driver = getattr(method, "driver", "auto")
    if driver != "auto":
        return driver in ("batch", "stepwise")
    return share == "own" or problem.admixture.documents(problem.kwargs).on_disk


def own_rows(problem: Problem, ranks: Ranks) -> Problem:
    """The problem of a rank that brought its own rows, in step with the others."""
    structure = problem.structure
    names, rows = structure.row_arguments, structure.num_rows
    sites = tuple((s.name, s.kind, s.family, s.plates) for s in structure.sites)
    shapes = {n: tuple(problem.kwargs[n].shape[1:]) for n in names}
    cards = ranks.gather((sites, shapes, rows))
    for r, card in enumerate(cards):
        if card[:2] != cards[0][:2]:
            raise ValueError(
                f"ranks='own': the rows of rank {r} do not fit those of rank 0: columns {card[1]} against {cards[0][1]}"
                + ("" if card[0] == cards[0][0] else "; the story has other sites there")
            )
    shared = ranks.gather({n: print_of(v, rows) for n, v in problem.kwargs.items() if n not in names})
    if different := [n for n in shared[0] if any(other.get(n) != shared[0][n] for other in shared)]:
        raise ValueError(
            f"ranks='own': {', '.join(map(repr, different))} differs between the ranks, and is no table with an entry a row; "
            f"rows may be each rank's own, all else must be the same on every rank"
        )
    kinds = ranks.gather({n: problem.kwargs[n].dtype for n in names})
    kwargs = dict(problem.kwargs)
    for name in names:
        if len({k[name] for k in kinds}) > 1:
            kwargs[name] = kwargs[name].to(problem.dtype)
    holes = ranks.gather({s.name: s.missing for s in structure.sites})
    missing = {name: sum(h[name] for h in holes) for name in holes[0]}
    merged = replace(structure, sites=tuple(replace(s, missing=missing[s.name]) for s in structure.sites), _by_name={})
    counts = tuple(card[2] or 0 for card in cards)
    few = ranks.first({n: v.cpu() if isinstance(v, Tensor) else v for n, v in (problem.few or {}).items()})
    few = {n: v.to(problem.device) if isinstance(v, Tensor) else v for n, v in few.items()}
    return replace(problem, kwargs=kwargs, structure=merged, few=few, ranks=replace(ranks, counts=counts))


def print_of(value: Any, rows: int | None) -> str:
    """What tells one argument from another; the number of one's own rows is the same as another's."""
    if isinstance(value, Tensor):
        some = value.detach().cpu().contiguous().numpy()
        return f"{tuple(value.shape)} {hashlib.sha256(some.tobytes()).hexdigest()}"
    return "rows" if value == rows and type(value) is int else in_words(value)


def table_print(problem: Problem) -> tuple[Any, ...]:
    """What tells one table from another: shapes, and some rows."""
    shapes, values = {}, []
    for name, value in problem.kwargs.items():
        if isinstance(value, Tensor):
            shapes[name] = tuple(value.shape)
            at = torch.linspace(0, len(value) - 1, min(PRINT_ROWS, len(value))).long() if value.ndim else None
            values.append((value if at is None else value[at.to(value.device)]).cpu().numpy().tobytes())
        else:
            values.append(repr(value).encode())
    return shapes, b"".join(values)

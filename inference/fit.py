"""The front door: validate, inspect, choose, run, and hand back one kind of answer."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .choose import WANTS, Choice, check_request, choose
from .devices import DeviceChoice, only_here, release, settled
from .distributed import ALONE, SHARES, Ranks, first_warns, own_device, start
from .guard import MemoryGuard, frees_memory
from .lazy_rows import has_lazy, resident
from .mending import MISTAKES, known, retold
from .methods import resolve
from .methods.base import Method, one_of, positive_float, positive_int
from .posterior import Posterior
from .problem import Problem, brought_home, prepare
from .sharing import same_call, shared_out
from .streaming import finish_reading

#: Seconds that NUTS may be expected to take before `auto` prefers SVI, where no budget is given.
PATIENCE = 300.0
#: Gradients that NUTS takes, one after the other: four chains of 1,000 iterations share one vectorised gradient.
GRADIENTS = 1000 * 16


@frees_memory
def fit(
    story: Any,
    data: Any,
    method: str | Method = "auto",
    *,
    guide: Callable | None = None,
    want: str = "auto",
    seed: int | None = None,
    device: str | torch.device = "auto",
    budget: float | None = None,
    memory: float | None = None,
    progress: bool | None = None,
    ranks: str = "split",
    cross_check: bool | str | Method = False,
) -> Posterior:
    """Infer what a generative story leaves unsaid, given what was seen.

    Parameters
    ----------
    story
        A Pyro program: any callable that samples, or an object with a `model` method and perhaps a `guide`.
    data
        One array for the story's first argument, a tuple, or a mapping (or data frame) of its arguments. NaN is
        missing data where a site can integrate it out.
    method
        "auto", a name ("em", "nuts", "svi") or a configured method: `NUTS(chains=4)`, `EM(restarts=10)`. A method
        that is not valid for the story is refused with the reason.
    guide
        Replaces the story's guide; without either, one is derived from the story.
    want
        "posterior" (distributions over the globals), "point", or "auto".
    seed
        Of every random choice: the same seed gives the same numbers, bit by bit. None draws one from the operating
        system and records it as `posterior.seed`.
    device
        "auto", "cpu" or "cuda". "auto" times a few steps on each device that is there, and says in `posterior.why()` what it
        took and why.
    budget
        Seconds that the run may take; the best answer so far is returned, marked as not converged.
    memory
        Megabytes that the process may hold (`posterior.timings["peak_memory"]` tells what it took); likewise.
    progress
        Progress bars; None shows them on a terminal. Of several processes, the first one shows them.
    ranks
        What the processes that `torchrun` started (if it did) are given, all of them calling this with the same other
        arguments. "split": each the whole table, of which it works on its share. "own": each rows of its own, as many as it
        has. "alone": each fits by itself. Every process gets the same answer.
    cross_check
        Run an independent second method on a small replica afterwards and say how far it ends from the first, as
        `posterior.cross_check`: True chooses it, or a name or configured method. The answer itself stays the same to the bit.

    Returns
    -------
    Posterior
        The same questions have the same names whatever method answered.

    Raises
    ------
    TypeError, ValueError
        Bad data or a story with a mistake, before any work; nothing global has changed.
    DivergenceError
        The run left the finite numbers; the last finite state is attached.
    RankError
        Another process of the same fit has ended.

    Examples
    --------
    >>> posterior = fit(GMM(num_components=3), load("iris").x, seed=0)   # doctest: +SKIP
    >>> print(posterior.why())                                           # doctest: +SKIP
    """
    method = resolve(method) if method != "auto" else method
    check_arguments(data, want, seed, budget, memory, ranks)
    began = time.perf_counter()
    others = start(ranks)
    asked = {"story": story, "method": method, "guide": guide, "want": want, "seed": seed, "device": str(device)}
    same_call(others, "fit", **asked, budget=budget, memory=memory, ranks=ranks, cross_check=cross_check)
    if progress is None:
        progress = sys.stderr.isatty()

    def on(place: str | torch.device) -> Problem:
        return prepare(
            story,
            data,
            guide=guide,
            device=own_device(place) if others.several else place,
            seed=seed,
            budget=budget,
            want=want,
            progress=progress and others.leads,
        )

    with first_warns(others):
        problem = others.together(lambda: on(device))
    if others.several:
        problem = replace(problem, seed=others.first(problem.seed))
    choice = others.together(lambda: decide(problem, method))
    if method == "auto":
        choice = others.first(choice)  # clocks differ
    if cross_check is not False and cross_check is not True:
        check_request(problem.structure, cross_check)
    problem, place = placed(problem, choice, device, on, others)
    with first_warns(others):
        posterior = run(problem, choice, time.perf_counter() - began, others, memory)
    if place is not None:
        told = {**posterior.diagnostics, "device": str(place)}
        posterior = replace(posterior, diagnostics=told, timings={**posterior.timings, **place.timings})
    return posterior if cross_check is False else seconded(posterior, cross_check, others, progress)


def check_arguments(
    data: Any, want: str, seed: int | None, budget: float | None, memory: float | None, ranks: str
) -> None:
    """Refuse what no story needs to be looked at for.

    Raises
    ------
    ValueError
        An option that is none of those it may be, or no data.
    """
    one_of("fit", "want", want, WANTS)
    if seed is not None:
        positive_int("fit", "seed", seed, least=0)
    if budget is not None:
        positive_float("fit", "budget", budget)
    if memory is not None:
        positive_float("fit", "memory", memory)
    if data is None:
        raise ValueError("data is None: there is nothing to learn from. To draw from the story use simulate(story)")
    one_of("fit", "ranks", ranks, SHARES)


def placed(
    problem: Problem, choice: Choice, device: str | torch.device, on: Callable[[str], Problem], others: Ranks
) -> tuple[Problem, DeviceChoice | None]:
    """The problem where it is to be worked on, and why there if that was to be found out."""
    place = None
    if device == "auto":
        problem, place = on_a_device(problem, choice, on, others)
    if problem.device.type != "cpu" and (alone := only_here(problem, choice.method)):
        problem, place = brought_home(problem), DeviceChoice("cpu", (), alone, str(device))
    return problem, place


def seconded(posterior: Posterior, second: bool | str | Method, ranks: Ranks, progress: bool) -> Posterior:
    """With a cross-check; of several ranks the first one makes it, of the rows that it has."""
    if not ranks.several:
        return posterior.cross_checked(second, progress=progress)
    alone = replace(posterior, problem=replace(posterior.problem, ranks=ALONE))
    found = ranks.together(lambda: alone.cross_checked(second, progress=progress) if ranks.leads else None)
    told = ranks.first(None if found is None else found.cross_check)
    return posterior if told is None else posterior.with_check(told)


def on_a_device(
    problem: Problem, choice: Choice, on: Callable[[str], Problem], others: Ranks
) -> tuple[Problem, DeviceChoice]:
    """The problem where its method runs fastest; of several ranks the first decides, as its clock is not the others'."""
    if not others.several:
        return settled(problem, choice.method, lambda place: replace(on(place), seed=problem.seed))
    place = others.first(settled(problem, choice.method, on)[1] if others.leads else DeviceChoice("cpu"))
    if place.device == "cpu":
        return problem, place
    return others.together(lambda: replace(on(place.device), seed=problem.seed, asked="auto")), place


def decide(problem: Problem, method: str | Method) -> Choice:
    """The user's method, or the first rule that holds; NUTS is timed before `auto` takes it."""
    if method != "auto":
        return check_request(problem.structure, method)
    if has_lazy(problem.kwargs):
        elsewhere = "it sees all rows at once, and these are read piece by piece"
        return choose(problem.structure, problem.want, slow={"nuts": elsewhere})
    choice = choose(problem.structure, problem.want)
    if choice.method.name == "nuts" and choice.verdicts["svi"].applies:
        seconds, text = pilot(problem)
        if seconds > (problem.budget or PATIENCE):
            choice = choose(problem.structure, problem.want, slow={"nuts": text})
    return choice


def pilot(problem: Problem) -> tuple[float, str]:
    """Seconds that NUTS would need, from gradients of the eager log joint, or of the captured one where that is too slow."""
    from .foresight import part
    from .joint import LogJoint

    times = []
    some, share = part(problem)
    with problem.scope(problem.seed), told_by_the_story(problem):
        joint = LogJoint(some)
        for _ in range(3):
            flat = joint.flatten(joint.prior_draw()).requires_grad_()
            start = time.perf_counter()
            torch.autograd.grad(joint.unconstrained(flat), flat)
            times.append(time.perf_counter() - start)
    each = share * min(times)
    limit = problem.budget or PATIENCE
    if GRADIENTS * each > limit and problem.small and problem.device.type == "cpu":
        each = min(each, captured(problem))  # a story of many small sites spends its time in Python, which NUTS leaves
    seconds = GRADIENTS * each
    return seconds, f"NUTS would take about {seconds:,.0f} s at {each * 1e3:.1f} ms a gradient (limit {limit:g} s)"


def captured(problem: Problem) -> float:
    """Seconds of one gradient as NUTS will have it: as machine code or as a graph; infinite where it cannot be told."""
    from .marginal import density_of_globals
    from .methods.backends import choose_backend
    from .methods.sampling import potential_of

    with problem.scope(problem.seed), told_by_the_story(problem):
        try:
            potential = potential_of(density_of_globals(problem), "auto")
            code = choose_backend(potential, "auto", 2000).code
        except ValueError:
            return math.inf  # NUTS will say why
        call: Callable = code or potential.numpy
        point, times = potential.points[0].double().numpy(), []
        for _ in range(3):
            start = time.perf_counter()
            call(point)
            times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def told_by_the_story(problem: Problem) -> Iterator[None]:
    """A fault that shows itself only where latents are summed out is raised in the story's words."""
    try:
        yield
    except MISTAKES as error:
        told = retold(error, known(problem.structure), problem.kwargs)
        if told is None:
            raise
        raise told from error


def run(
    problem: Problem, choice: Choice, setup: float = 0.0, ranks: Ranks = ALONE, memory: float | None = None
) -> Posterior:
    """Run the chosen method in a scope of its own and complete the answer."""
    start = time.perf_counter()
    shared = shared_out(problem, ranks, choice.method)
    if getattr(choice.method, "spreads", "nothing") != "rows":
        shared = resident(shared, choice.method.name)
    with problem.scope(problem.seed):
        try:
            with told_by_the_story(problem), MemoryGuard(memory) as guard:
                posterior = choice.method.run(shared)
        finally:
            finish_reading()
        if shared is not problem:
            posterior = replace(posterior, problem=problem if ranks.share == "split" else posterior.problem)
    posterior = replace(posterior, choice=choice).brought_home()
    if problem.device.type == "cuda":
        release()  # for other processes, too
    with posterior.problem.scope(problem.seed):
        if guard.reached is not None:
            note = f"the memory budget of {memory:g} MB is used up ({guard.reached:.0f} MB): the best state so far is returned"
            posterior = replace(posterior, warnings=[note, *posterior.warnings], converged=False)
        posterior = posterior.finished()
        if ranks.several:
            posterior = agreed(posterior, ranks)
    threads = 1 if problem.small else torch.get_num_threads()  # sums over more are grouped otherwise
    found = {"device": str(problem.device), "threads": threads}
    posterior = replace(posterior, diagnostics={**posterior.diagnostics, **found})
    timings = dict(posterior.timings)
    timings["setup"] = timings.get("setup", 0.0) + setup
    timings["total"] = setup + time.perf_counter() - start
    return replace(posterior, timings=timings)


def agreed(posterior: Posterior, ranks: Ranks) -> Posterior:
    """The same answer on every rank, to the last bit: that of rank 0, but for latents of rows that a rank brought itself."""
    names = ["kind", "chains", "history", "diagnostics", "warnings", "sample_stats", "converged"]
    told = {n: getattr(posterior, n) for n in names}
    told["draws"] = {n: v for n, v in posterior.draws.items() if not rows_of_a_rank(posterior, n, ranks)}
    if ranks.share == "split":
        told["extra"] = posterior.extra
    told = ranks.first(told)
    told["draws"] = {n: told["draws"].get(n, v) for n, v in posterior.draws.items()}
    return replace(posterior, **told)


def rows_of_a_rank(posterior: Posterior, name: str, ranks: Ranks) -> bool:
    """Whether draws are of one rank's rows."""
    structure = posterior.structure
    return ranks.share == "own" and name in structure and structure[name].local

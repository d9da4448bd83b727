"""Topic stories handed to their engines: expected counts for EM, natural gradients for SVI, Gibbs sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..guard import Deadline
from ..meter import Meter
from . import cards, expected
from . import streamed as streaming
from .form import Admixture
from .gibbs import sample
from .streamed import StreamedBayes
from .variational import VariationalBayes, improve_concentrations
from .weights import dirichlet_draws, heights, num_weights, untrusted, weighed
from .words import library

if TYPE_CHECKING:
    from ..methods.em import EM
    from ..methods.gibbs import Gibbs
    from ..methods.svi import SVI
    from ..posterior import Posterior
    from ..problem import Problem

#: EM's `tol` is for a row; words are many and a change of this many tolerances a word is little.
WORD_TOL = 100.0
#: Entries of the documents that a device is timed on.
TRIED = 500_000
#: Numbers that draws of the topics may take, and draws at least.
DRAW_NUMBERS, DRAWS = 25_000_000, 25


def plan(form: Admixture, device: torch.device | str = "cpu") -> str:
    """How EM would run on a device, in words."""
    lines = ["EM plan (topic model)"]
    if form.walk:
        lines.append(
            f"  {form.topics:<12} Newton steps by preconditioned conjugate gradients, {form.num_topics} x {form.num_words} "
            f"chains of {form.num_slices} slices at once"
        )
        lines += [f"  {form.walk.base:<12} closed form"] if form.walk.base else []
    else:
        lines.append(f"  {form.topics:<12} expected counts: posterior means given the assignments of all words")
    lines.append(f"  {form.theta:<12} integrated out approximately (collapsed variational Bayes of order zero)")
    lines += [f"  {form.z:<12} probabilities for every distinct word of every document"] if form.z else []
    params = (form.alpha_param, form.eta_param, form.walk.step_param if form.walk else None)
    lines += [f"  {name:<12} learned on expected counts, stopped by documents set aside" for name in params if name]
    way = way_of(device) if not form.walk else way_of("cpu")
    lines.append(f"  {'passes':<12} {way}")
    return "\n".join(lines)


def way_of(device: torch.device | str) -> str:
    """How passes over documents are made on a device."""
    if cards.on_card(device):
        return (
            f"large blocks of documents at once on {device}, counts added up in a fixed order and in double precision"
        )
    return "word by word, in machine code" if library() else "blocks of documents at once (there is no C compiler)"


def way_of_streams(documents: Any, device: torch.device) -> str:
    """The same where nothing of a document is kept."""
    if not cards.on_card(device):
        return f"{way_of(device)}; documents are inferred anew at every visit"
    stay = "whose counts stay there" if cards.stay(documents, device) else "whose counts are read ahead and copied"
    return f"{way_of(device)}; documents, {stay}, are inferred anew at every visit"


def refuse_options(em: EM, dynamic: bool = False) -> None:
    """Options of EM that have no meaning here."""
    from ..methods.em import DRIVERS

    if em.estimate == "mle":
        raise ValueError(
            "EM(estimate='mle') is not available for topic models: without priors on shares and topics, rare words have "
            "probability 0; use estimate='map' with small concentrations"
        )
    for name, unset in (
        ("driver", ("auto", "incremental", "batch") if dynamic else DRIVERS),
        ("start", (None,)),
        ("checkpoint", (None,)),
        ("kernels", (True,)),
    ):
        if getattr(em, name) not in unset:
            raise ValueError(
                f"EM({name}={getattr(em, name)!r}) is not available for topic models, which are fitted on expected counts "
                f"of all documents; leave it out"
            )


def deadline_of(problem: Problem) -> Deadline:
    """When to end: the budget is used up, or Ctrl-C was pressed."""
    return Deadline(problem.budget)


def learned(problem: Problem, form: Admixture, alpha: Tensor, eta: Tensor) -> dict[str, Tensor]:
    """Values of the parameters that concentrations are learned as, one draw each."""
    shapes = {s.name: s.shape for s in problem.structure.learned}
    found = {}
    for name, value in ((form.alpha_param, alpha), (form.eta_param, eta)):
        if name:
            value = value.double().cpu()
            size = math.prod(shapes[name])
            found[name] = (value.mean() if size == 1 else value.reshape(-1)[:size]).reshape(1, *shapes[name])
    return found


@cards.processor_first
def run_em(problem: Problem, em: EM) -> Posterior:
    """Expected counts; the points are posterior means."""
    from ..posterior import Posterior

    form = problem.admixture
    refuse_options(em, form.walk is not None)
    if form.walk:
        from .dynamic import run_em as run_dynamic

        return run_dynamic(problem, em)
    with deadline_of(problem) as over, Meter() as meter:
        documents = form.documents(problem.kwargs)
        same = bool((form.eta == form.eta[0]).all())
        eta = form.eta[:1].T if same else form.eta.T
        meter.mark("setup")
        bar = tqdm(total=em.max_iter, desc="EM", disable=not problem.progress, leave=False)
        with bar:

            def tick(i: int, value: float) -> None:
                bar.update()
                bar.set_postfix_str(f"{value:.4f} a word", refresh=False)
                if em.callback is not None:
                    em.callback(i, value, {})

            sizes = {s.name: math.prod(s.shape) for s in problem.structure.learned}
            ranks = problem.ranks
            where = problem.device
            streamed = keeps_nothing(documents, form, em, ranks, where)
            ran = way_of_streams(documents, where) if streamed else way_of(where)
            driver = em.driver if em.driver in ("batch", "stepwise") else "stepwise"
            climb = partial(streaming.climb, driver=driver, ranks=ranks) if streamed else expected.climb
            end = climb(
                documents, form.alpha.to(where), eta.contiguous().to(where),
                learn_alpha=form.alpha_param is not None, learn_eta=form.eta_param is not None,
                tied=sizes.get(form.alpha_param or "", 0) == 1 < form.num_topics,
                restarts=em.restarts, max_iter=em.max_iter, tol=WORD_TOL * em.tol, seed=problem.seed,
                tick=tick, over=over,
            )  # fmt: skip
        state = end.state
        kept = {} if streamed else {"theta.concentration": (state.n + state.alpha).double().cpu()}
        draws = {form.topics: normalised(state.phi)[None]}
        draws |= learned(problem, form, state.alpha, state.eta[:1] if same else state.eta.T)
        meter.mark("run")
    warnings = [over.reason] if end.stopped else []
    if not end.converged and not end.stopped:
        warnings.append(f"EM did not converge in {em.max_iter} passes; raise max_iter or tol")
    tokens = max(streaming.total(problem.ranks, documents.num_tokens), 1.0)
    return Posterior(
        kind="point",
        method=em,
        problem=problem,
        draws=draws,
        history=end.history,
        diagnostics={
            "plan": plan(form, where),
            "ran": ran,
            "iterations": len(end.history),
            ("log_likelihood_a_word" if streamed else "leave_one_out"): end.history[-1] / tokens,
            **({"validation_perplexity": end.validation} if end.validation or not streamed else {}),
            **several("restarts", "log-likelihood", end.trials),
        },
        warnings=warnings + want_notes(problem),
        timings=meter.timings,
        converged=end.converged,
        extra={"topics": kept, "keep_labels": True},
    )


def keeps_nothing(documents: Any, form: Admixture, em: EM, ranks: Any, where: torch.device) -> bool:
    """Whether documents are let go after a visit: on disk, held apart by ranks, or too many for the card, unless asked for.

    Raises
    ------
    ValueError
        `driver="incremental"`, which keeps the topics of every word, does not fit the card.
    """
    if em.driver not in ("auto", "incremental"):
        return True
    bytes_an_entry = cards.PLACE_BYTES + 4 * form.num_topics * (2 if em.restarts > 1 else 1)
    fits = not cards.on_card(where) or cards.keeps(documents, cards.SIMILAR * bytes_an_entry, where)
    if em.driver == "incremental":
        if not fits:
            raise ValueError(
                f"EM(driver='incremental') keeps the topics of every distinct word of every document: "
                f"{len(documents.words):,} entries x {form.num_topics} topics take more than half of what {where} has free; "
                f"use driver='stepwise', which keeps none, or restarts=1"
            )
        return False
    return documents.on_disk or ranks.shares_rows or not fits


def trial(problem: Problem, method: Any) -> Callable[[], Any]:
    """A pass over the first documents where the problem is, to be timed."""
    step = begun(problem, method)
    again = cards.processor_first(lambda problem, method: step())
    return lambda: again(problem, method)


@cards.processor_first
def begun(problem: Problem, method: Any) -> Callable[[], Any]:
    """That pass, everything that is done once behind it."""
    form, where = problem.admixture, problem.device
    whole = form.documents(problem.kwargs)
    last = int(np.searchsorted(np.asarray(whole.starts), TRIED, side="right")) - 1
    documents = whole.cut(0, min(len(whole), max(1, last)))
    alpha, eta = form.alpha.float().to(where), form.eta.float().to(where)
    if method.name == "svi":
        return VariationalBayes(documents, alpha, eta).sweep
    if keeps_nothing(whole, form, method, problem.ranks, where):
        N = documents.num_tokens / eta.numel() * (0.5 + torch.rand(eta.T.shape, generator=torch.Generator())).to(where)
        return streaming.StreamedCounts(
            documents, expected.Counts(N, N.sum(0), N[:0], alpha, eta.T.contiguous())
        ).full_pass
    run = expected.engine(where)(documents, alpha, eta.T.contiguous())
    run.begin()
    return run.sweep


def several(what: str, objective: str, trials: list[list[float]]) -> dict[str, Any]:
    """What short climbs say about each other, where there were several."""
    from ..restarts import of_trials

    return {"restarts": of_trials(what, objective, trials, len(trials[0]))} if len(trials) > 1 else {}


def want_notes(problem: Problem) -> list[str]:
    """What points cannot give."""
    if problem.want == "posterior":
        return ["EM gives points for the topics: it says nothing about their uncertainty"]
    return []


def normalised(phi: Tensor) -> Tensor:
    """Topics in double precision that sum to one."""
    phi = phi.double().cpu()
    return (phi / phi.sum(-1, keepdim=True)).contiguous()


# -- variational Bayes ---------------------------------------------------------------------------------------------------


@cards.processor_first
def run_svi(problem: Problem, svi: SVI) -> Posterior:
    """Dirichlet factors by natural gradients; the bound is that of q(phi) q(theta) q(z)."""
    from ..posterior import Posterior

    form = problem.admixture
    if form.walk:
        from .dynamic import run_svi as run_dynamic

        return run_dynamic(problem, svi)
    with deadline_of(problem) as over, Meter() as meter:
        documents = form.documents(problem.kwargs)
        ranks = problem.ranks
        where = problem.device
        held = not cards.on_card(where) or cards.keeps(documents, cards.SIMILAR * cards.PLACE_BYTES, where)
        streamed = documents.on_disk or ranks.shares_rows or not held
        ran = way_of_streams(documents, where) if streamed else way_of(where)
        kind = partial(StreamedBayes, ranks=ranks) if streamed else VariationalBayes
        late = (lambda: ranks.first(over())) if ranks.shares_rows else over
        runs = [
            kind(documents, form.alpha.float().to(where), form.eta.float().to(where), seed=1000 * problem.seed + r)
            for r in range(svi.starts or 1)
        ]
        meter.mark("setup")
        histories: list[list[float]] = []
        few = streaming.total(ranks, documents.num_tokens) < expected.MANY
        trial = (30 if few else 4) if len(runs) > 1 else 1
        for run in runs:
            if svi.batch_size is not None:
                run.stochastic_pass()
            histories.append([run.sweep() for _ in range(min(trial, svi.steps))])
        trials = [list(h) for h in histories]
        best = max(range(len(runs)), key=lambda r: histories[r][-1])
        run, history, warnings, converged = runs[best], histories[best], [], False
        bar = tqdm(total=svi.steps, desc="SVI", disable=not problem.progress, leave=False)
        with bar:
            while len(history) < svi.steps:
                improve_concentrations(run, form, len(history))
                history.append(run.sweep())
                bar.update()
                bar.set_postfix_str(f"elbo={history[-1]:.6g}", refresh=False)
                if history[-1] - history[-2] < svi.tol * abs(history[-1]):
                    if not run.fresh:
                        converged = True
                        break
                    run.fresh = False  # the last sweeps never fall
                if late():
                    warnings.append(over.reason or "the budget of the first rank is used up")
                    break
        run.widen()
        bound = run.bound()
        if not converged and not warnings:
            warnings.append(f"SVI did not converge in {svi.steps} sweeps: the bound was still rising; raise steps")
        assert run.lam is not None
        lam = run.lam.cpu()
        count = max(DRAWS, min(svi.draws, DRAW_NUMBERS // max(1, lam.numel())))
        weights = num_weights(documents, form)
        phi = dirichlet_draws(lam, max(count, weights), problem.seed)
        draws: dict[str, Tensor] = {form.topics: phi[:count]}
        trusted = weighed(documents, phi[:weights], lam.double(), run, problem.seed, ranks, over)
        warnings += untrusted(trusted, form)
        draws |= {n: v.expand(count, *v.shape[1:]) for n, v in learned(problem, form, run.alpha, run.eta[:1]).items()}
        meter.mark("run")
    return Posterior(
        kind="variational",
        method=svi,
        problem=problem,
        draws=draws,
        history=history,
        diagnostics={
            "guide": "dirichlet",
            "mode": "natural gradients",
            **({"ran": ran} if cards.on_card(where) else {}),
            "steps": len(history),
            "elbo": bound,
            "elbo_error": 0.0,
            **trusted,
            **several("starts", "ELBO", trials),
        },
        warnings=warnings,
        timings=meter.timings,
        converged=converged,
        extra={"topics": {"phi.concentration": lam} | ({} if streamed else {"theta.concentration": run.gamma.cpu()})},
    )


# -- Gibbs ---------------------------------------------------------------------------------------------------------------


@cards.processor_first
def run_gibbs(problem: Problem, gibbs: Gibbs) -> Posterior:
    """Draws of topics and shares from the exact posterior."""
    from ..posterior import Posterior

    form = problem.admixture
    with deadline_of(problem) as over, Meter() as meter:
        documents = form.documents(problem.kwargs)
        meter.mark("setup")
        total = gibbs.warmup + gibbs.draws * gibbs.thin
        bar = tqdm(total=total, desc="Gibbs", disable=not problem.progress, leave=False)
        with bar:
            phi, theta, late = sample(
                documents, form.alpha.double().cpu(), form.eta.double().cpu(),
                chains=gibbs.chains, warmup=gibbs.warmup, draws=gibbs.draws, thin=gibbs.thin, seed=problem.seed,
                tick=lambda i: bar.update(), over=over,
            )  # fmt: skip
        meter.mark("run")
    draws: dict[str, Any] = {form.topics: phi.flatten(0, 1), form.theta: form.site_theta(theta.flatten(0, 1))}
    height = heights(documents, phi, theta)
    warnings = [over.reason] if late else []
    if late and phi.shape[1] == 1:
        warnings.append(
            "it was still warming up: these are the places where the chains stand, not draws from the posterior"
        )
    return Posterior(
        kind="samples",
        method=gibbs,
        problem=problem,
        draws=draws,
        chains=gibbs.chains,
        diagnostics={"sampler": "partially collapsed Gibbs", "draws": phi.shape[1]},
        warnings=warnings,
        timings=meter.timings,
        sample_stats={"log_likelihood": height},
        converged=not late,
    )

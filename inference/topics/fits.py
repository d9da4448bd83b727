"""Topic stories handed to their engines: expected counts for EM, natural gradients for SVI, Gibbs sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..guard import Deadline
from ..meter import Meter
from . import cards, expected
from . import streamed as streaming
from .form import Admixture
from .gibbs import sample
from .pass_file import PassFile
from .streamed import StreamedBayes
from .variational import VariationalBayes, improve_concentrations
from .ways import keeps_nothing, way_of, way_of_streams
from .weights import dirichlet_draws, heights, num_weights, untrusted, weighed

if TYPE_CHECKING:
    from ..methods.em import EM
    from ..methods.gibbs import Gibbs
    from ..methods.svi import SVI
    from ..posterior import Posterior
    from ..problem import Problem

#: EM's `tol` is for a row; words are many and a change of this many tolerances a word is little.
WORD_TOL = 100.0
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
        ("checkpoint", (None,) if dynamic else (em.checkpoint,)),
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
            if em.checkpoint is not None and not streamed:
                raise ValueError(
                    "EM(checkpoint=...): a topic model keeps its state between passes over documents that are let go after a "
                    "visit; pass driver='batch' or 'stepwise' too"
                )
            said = replace(em, checkpoint=None, callback=None)
            file = PassFile("EM", em.checkpoint, problem, documents, said)
            climb = partial(streaming.climb, driver=driver, ranks=ranks, file=file) if streamed else expected.climb
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
    warnings = ([over.reason] if end.stopped else []) + file.lost
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
        file = PassFile("SVI", svi.checkpoint, problem, documents, replace(svi, checkpoint=None))
        meter.mark("setup")

        def begun(r: int) -> VariationalBayes:
            return kind(
                documents, form.alpha.float().to(where), form.eta.float().to(where), seed=1000 * problem.seed + r
            )

        if (found := file.read()) is not None:
            run, (history, trials) = begun(0), (found[1]["history"], found[1]["trials"])
            run.go_on(found[0], found[1]["steps"], found[1]["fresh"])
        else:
            few = streaming.total(ranks, documents.num_tokens) < expected.MANY
            run, history, trials = best_start([begun(r) for r in range(svi.starts or 1)], svi, few)

        def kept() -> tuple[dict[str, Tensor], dict[str, Any]]:
            return run.tensors(), {"steps": run.steps, "fresh": run.fresh, "history": history, "trials": trials}

        converged, stopped = swept(problem, svi, run, history, lambda: file.write(*kept()), late)
        warnings = [over.reason or "the budget of the first rank is used up"] if stopped else []
        file.leave(not warnings, *kept())
        warnings += file.lost
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


def swept(
    problem: Problem, svi: SVI, run: Any, history: list[float], keep: Callable[[], None], late: Callable[[], bool]
) -> tuple[bool, bool]:
    """Sweeps, whose bounds join the history, until they help no more: whether that came, and whether time ran out before."""
    with tqdm(total=svi.steps, desc="SVI", disable=not problem.progress, leave=False) as bar:
        while len(history) < svi.steps:
            improve_concentrations(run, problem.admixture, len(history))
            history.append(run.sweep())
            bar.update()
            bar.set_postfix_str(f"elbo={history[-1]:.6g}", refresh=False)
            if history[-1] - history[-2] < svi.tol * abs(history[-1]):
                if not run.fresh:
                    return True, False
                run.fresh = False  # the last sweeps never fall
            keep()
            if late():
                return False, True
    return False, False


def best_start(runs: list[Any], svi: SVI, few: bool) -> tuple[Any, list[float], list[list[float]]]:
    """The best of some short runs, its bounds so far, and those of all."""
    trial = (30 if few else 4) if len(runs) > 1 else 1
    trials: list[list[float]] = []
    for run in runs:
        if svi.batch_size is not None:
            run.stochastic_pass()
        trials.append([run.sweep() for _ in range(min(trial, svi.steps))])
    best = max(range(len(runs)), key=lambda r: trials[r][-1])
    return runs[best], list(trials[best]), trials


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

"""Topic stories handed to their engines: expected counts for EM, natural gradients for SVI, Gibbs sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..guard import Deadline
from ..meter import Meter
from . import expected
from . import streamed as streaming
from .form import Admixture
from .gibbs import sample
from .pass_file import PassFile
from .streamed import StreamedBayes
from .variational import VariationalBayes, improve_concentrations
from .words import Places, library, padded, settle

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
#: Importance weights of a guide, fewer where there are so many pairs of words and topics.
WEIGHTS, FEW_WEIGHTS, MANY_CELLS = 200, 25, 5_000_000


def plan(form: Admixture) -> str:
    """How EM would run, in words."""
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
    way = "word by word, in machine code" if library() else "blocks of documents at once (there is no C compiler)"
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
        ("driver", ("auto", "incremental") if dynamic else DRIVERS),
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
            streamed = documents.on_disk or ranks.shares_rows if em.driver == "auto" else em.driver != "incremental"
            driver = "stepwise" if em.driver == "auto" else em.driver
            if em.checkpoint is not None and not streamed:
                raise ValueError(
                    "EM(checkpoint=...): a topic model keeps its state between passes over documents that are let go after a "
                    "visit; pass driver='batch' or 'stepwise' too"
                )
            said = replace(em, checkpoint=None, callback=None)
            file = PassFile("EM", em.checkpoint, problem, documents, said)
            climb = partial(streaming.climb, driver=driver, ranks=ranks, file=file) if streamed else expected.climb
            end = climb(
                documents, form.alpha.cpu(), eta.contiguous().cpu(),
                learn_alpha=form.alpha_param is not None, learn_eta=form.eta_param is not None,
                tied=sizes.get(form.alpha_param or "", 0) == 1 < form.num_topics,
                restarts=em.restarts, max_iter=em.max_iter, tol=WORD_TOL * em.tol, seed=problem.seed,
                tick=tick, over=over,
            )  # fmt: skip
        state = end.state
        kept = {} if streamed else {"theta.concentration": (state.n + state.alpha).double()}
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
            "plan": plan(form),
            "iterations": len(end.history),
            ("log_likelihood_a_word" if streamed else "leave_one_out"): end.history[-1] / tokens,
            **({} if streamed else {"validation_perplexity": end.validation}),
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
        streamed = documents.on_disk or ranks.shares_rows
        kind = partial(StreamedBayes, ranks=ranks) if streamed else VariationalBayes
        late = (lambda: ranks.first(over())) if ranks.shares_rows else over
        file = PassFile("SVI", svi.checkpoint, problem, documents, replace(svi, checkpoint=None))
        meter.mark("setup")

        def begun(r: int) -> VariationalBayes:
            return kind(documents, form.alpha.float().cpu(), form.eta.float().cpu(), seed=1000 * problem.seed + r)

        if (found := file.read()) is not None:
            run, (history, trials) = begun(0), (found[1]["history"], found[1]["trials"])
            run.go_on(found[0], found[1]["steps"], found[1]["fresh"])
        else:
            few = streaming.total(ranks, documents.num_tokens) < expected.MANY
            run, history, trials = best_start([begun(r) for r in range(svi.starts or 1)], svi, few)
        warnings, converged = [], False

        def kept() -> tuple[dict[str, Tensor], dict[str, Any]]:
            return run.tensors(), {"steps": run.steps, "fresh": run.fresh, "history": history, "trials": trials}

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
                file.write(*kept())
                if late():
                    warnings.append(over.reason or "the budget of the first rank is used up")
                    break
        file.leave(not warnings, *kept())
        warnings += file.lost
        run.widen()
        bound = run.bound()
        if not converged and not warnings:
            warnings.append(f"SVI did not converge in {svi.steps} sweeps: the bound was still rising; raise steps")
        lam = run.lam
        assert lam is not None
        count = max(DRAWS, min(svi.draws, DRAW_NUMBERS // max(1, lam.numel())))
        weights = 0 if streamed else num_weights(documents, form)
        phi = dirichlet_draws(lam, max(count, weights), problem.seed)
        draws: dict[str, Tensor] = {form.topics: phi[:count]}
        trusted = weighed(documents, phi[:weights], lam.double(), run, problem.seed) if weights else {}
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
            "steps": len(history),
            "elbo": bound,
            "elbo_error": 0.0,
            **trusted,
            **several("starts", "ELBO", trials),
        },
        warnings=warnings,
        timings=meter.timings,
        converged=converged,
        extra={"topics": {"phi.concentration": lam} | ({} if streamed else {"theta.concentration": run.gamma})},
    )


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


def num_weights(documents: Any, form: Any) -> int:
    """Draws of the guide that are weighed."""
    return FEW_WEIGHTS if documents.counts.size * form.num_topics > MANY_CELLS else WEIGHTS


def weighed(documents: Any, phi: Tensor, lam: Tensor, run: Any, seed: int) -> dict[str, float]:
    """k-hat and effective share of importance weights p(w, theta, phi) / q(theta, phi), topics of words summed out."""
    from ..diagnostics import pareto_khat

    gamma = run.gamma.double()
    count, theta = len(phi), dirichlet_draws(gamma, len(phi), seed + 1)
    pairs = (
        (run.eta.double().cpu().expand_as(lam), lam, phi),
        (run.alpha.double().cpu().expand_as(gamma), gamma, theta),
    )
    built = library() if count == FEW_WEIGHTS else None
    weights = heights(documents, phi[None], theta[None])[0] if built is None else told(built, documents, phi, theta)
    for prior, guide, values in pairs:
        constant = float((log_beta(guide) - log_beta(prior)).sum())
        weights = weights + np.array([constant + float(((prior - guide) * v.log()).sum()) for v in values])
    ratio = np.exp(weights - weights.max())
    return {"khat": pareto_khat(weights), "weight_ess": float(ratio.sum() ** 2 / (ratio**2).sum() / count)}


def log_beta(concentration: Tensor) -> Tensor:
    """Logarithm of the normaliser of Dirichlets (..., K), (...)."""
    return concentration.lgamma().sum(-1) - concentration.sum(-1).lgamma()


def told(built: Any, documents: Any, phi: Tensor, theta: Tensor) -> np.ndarray:
    """log p of all words at topics (S, K, V) and shares (S, D, K), in machine code and single precision, (S,)."""
    places, none = Places(documents), padded(torch.zeros(phi.shape[1]))
    return np.array([settle(built, places, padded(p.T), padded(t), none, 0) for p, t in zip(phi, theta, strict=True)])


def untrusted(found: dict[str, float], form: Any) -> list[str]:
    """A warning where the weights say that spreads are wrong."""
    from ..diagnostics import KHAT_LIMIT

    if not found:
        return ["k-hat is not known: documents are read piece by piece, and their shares are not kept"]
    if not found["khat"] > KHAT_LIMIT:
        return []
    instead = "" if form.alpha_param or form.eta_param else "; Gibbs() draws from the posterior itself"
    return [
        f"k-hat is {found['khat']:.2f} > {KHAT_LIMIT}: independent topics and shares miss a part of the posterior, and what "
        f"they say about spread is not to be trusted{instead}"
    ]


def dirichlet_draws(concentration: Tensor, count: int, seed: int) -> Tensor:
    """Draws (count, K, V); NumPy's gamma variates, which are several times as fast as torch's for small concentrations."""
    random, shape = np.random.default_rng(seed), concentration.numpy()
    gamma = torch.from_numpy(np.stack([random.standard_gamma(shape) for _ in range(count)])).clamp_min(1e-300)
    return gamma / gamma.sum(-1, keepdim=True)


# -- Gibbs ---------------------------------------------------------------------------------------------------------------


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


def heights(documents: Any, phi: Tensor, theta: Tensor) -> np.ndarray:
    """log p(words | topics, shares) of every draw: phi (C, S, K, V) and theta (C, S, D, K) -> (C, S)."""
    owner = torch.from_numpy(np.repeat(np.arange(len(documents)), np.diff(documents.starts)))
    words, counts = torch.from_numpy(documents.words).long(), torch.from_numpy(documents.counts).to(phi.dtype)
    found = [
        [float(counts @ (t[owner] * p[:, words].T).sum(-1).log()) for p, t in zip(a, b)] for a, b in zip(phi, theta)
    ]
    return np.array(found)

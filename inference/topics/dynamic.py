r"""The dynamic topic model: whole walks of all topics and words improved at once by Newton steps.

Given expected counts S (T, K, V) of words in topics and slices, with totals n (T, K), the log posterior of the walks is

.. math::
   \sum_{tk} \Big[\sum_v S_{tkv}\beta_{tkv} - n_{tk} \log\sum_v e^{\beta_{tkv}}\Big]
   - \frac{1}{2 s^2}\|\beta_1 - m\|^2 - \frac{1}{2\sigma^2}\sum_t \|\beta_t - \beta_{t-1}\|^2 .

Its negative Hessian is tridiagonal over time but for the coupling :math:`-n\pi\pi^\top` of the words of one topic and slice.
Conjugate gradients solve for the Newton step, with the tridiagonal part as preconditioner: K V chains of length T, all at once
in T steps over vectors.  The same chains are the precision of a Gaussian Markov guide around the mode, which gives bands and
draws (Blei and Lafferty, *Dynamic topic models*, ICML 2006, by a Laplace approximation instead of variational observations).

A learned sigma is the one of `DRIFTS` that foretells documents set aside best; where these are too few to tell, it follows from
the expected squared moves under the guide, which errs downwards on sparse counts.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..meter import Meter
from .documents import Block, Documents, by_slice
from .expected import climb, concentration_terms, set_aside, settle
from .fits import DRAW_NUMBERS, DRAWS, WORD_TOL, deadline_of, learned, plan, want_notes
from .form import Admixture
from .perplexity import complete
from .walks import Walks
from .words import Places, improved, library, padded
from .words import settle as settle_places

if TYPE_CHECKING:
    from ..posterior import Posterior
    from ..problem import Problem

#: Passes of the static model that the walks start from, and rounds within a document.
STATIC, INNER = 15, 5
#: Drifts that are tried, for how many iterations, and words set aside that are enough to choose by.
DRIFTS, SHORT, ENOUGH = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5), 5, 2000
#: EM's tolerance, for one word of a document.
TOL = 10 * WORD_TOL
#: Share of the variance that counts in forecasts, weight of a slice relative to the one after it, and slices that count: chosen
#: on slices before the last of speeches of two centuries.
MEAN, FADES, RECENT = 0.4, 0.2, 8
#: Iterations before sigma and alpha are learned.
BURN = 2


@dataclass
class Climb:
    """Expectation and Newton steps in turn, for one corpus."""

    form: Admixture
    documents: Documents
    seed: int = 0
    start: Any = None
    drift: float | None = None
    dtype: torch.dtype = torch.float32
    slices: list[tuple[int, list[Block]]] = field(init=False)
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        form = self.form
        walk = form.walk
        assert walk is not None
        self.alpha = form.alpha.to(self.dtype).cpu()
        eta = torch.full((form.num_words, 1), 0.05)
        static = self.start = self.start or self.static(eta)
        # a topic's own counts among those of all topics: rare words start at what they are on the whole
        N = static.state.N.T.to(self.dtype)
        common = (N.sum(0) + 0.5) / (N.sum() + 0.5 * form.num_words)
        phi = (N + 50.0 * common) / (N.sum(1, keepdim=True) + 50.0)
        start = phi.log() - common.log().mean()
        base = common.log() - common.log().mean() if walk.base else walk.loc.to(self.alpha)
        T = form.num_slices
        step = self.drift or walk.step
        self.walks = Walks(start.expand(T, -1, -1).clone(), base, walk.first, step)
        self.native = library() if self.dtype == torch.float32 else None
        self.passes = 0
        self.hold()

    def static(self, eta: Tensor) -> Any:
        """Topics that stand still, from which the walks start."""
        return climb(self.documents, self.alpha, eta, max_iter=STATIC, tol=0.0, seed=self.seed)

    def hold(self) -> None:
        """What is remembered of every document."""
        self.n = self.start.state.n.clone()
        self.places = Places(self.documents)
        self.lengths = torch.from_numpy(self.documents.lengths).float()
        T = self.form.num_slices
        self.slices = list(by_slice(self.documents, T, self.dtype)) if self.native is None else []

    def expectation(self) -> tuple[Tensor, float]:
        """Expected counts (T, K, V) at the present topics, and the log-likelihood of all words at the present shares."""
        phi = self.walks.beta.softmax(2)
        if self.native is not None:
            return self.word_by_word(self.native, phi)
        S, total = torch.zeros(phi.shape[0], phi.shape[2], phi.shape[1], dtype=self.dtype), 0.0
        gain, weight = torch.zeros_like(self.alpha), torch.zeros(())
        learn = self.form.alpha_param is not None and self.passes >= BURN
        for t, parts in self.slices:
            table = phi[t].T.contiguous()
            for block in parts:
                W = table[block.flat].view(*block.words.shape, -1)
                n, r = settle(W, block.counts, self.n[block.rows], self.alpha, INNER)
                self.n[block.rows] = r.sum(1)
                S[t].index_add_(0, block.flat, r.view(-1, r.shape[-1]))
                theta = (n + self.alpha) / (n + self.alpha).sum(1, keepdim=True)
                p = (W @ theta.unsqueeze(2)).squeeze(2)
                total += float(torch.xlogy(block.counts, p.clamp_min(1e-30)).sum())
                if learn:
                    g, w = concentration_terms(r, block.counts, self.alpha)
                    gain, weight = gain + g, weight + w
        if learn:
            self.alpha = (self.alpha * gain / weight).clamp(1e-4, 20.0)
        return S.transpose(1, 2).contiguous(), total

    def word_by_word(self, built: ctypes.CDLL, phi: Tensor) -> tuple[Tensor, float]:
        """The same in machine code."""
        tables, K, alpha = padded(phi.transpose(1, 2)), len(self.alpha), padded(self.alpha)
        S, n, none = torch.zeros_like(tables), padded(self.n), None
        if self.form.alpha_param is not None and self.passes >= BURN:
            none = torch.empty_like(n)
        which = torch.from_numpy(np.ascontiguousarray(self.documents.times, np.int64))
        total = settle_places(built, self.places, tables, n, alpha, INNER, S=S, none=none, which=which)
        self.n = n[:, :K].contiguous()
        if none is not None:
            self.alpha = improved(self.alpha, self.n, 1.0 - none[:, :K], self.lengths)
        return S[:, :, :K].transpose(1, 2).contiguous(), total

    def foretell(self, first: Documents, second: Documents) -> float:
        """log p of the second halves of new documents, completed from the first."""
        phi, total, times = self.walks.beta.softmax(2).double(), 0.0, np.asarray(first.times)
        for t in np.unique(times):
            which = np.flatnonzero(times == t)
            rows = complete(phi[t], self.alpha.double(), first.take(which), second.take(which))
            total += float(rows.sum())
        return total

    def iterate(self) -> float:
        """One expectation and one maximisation; the log-likelihood before."""
        walk = self.form.walk
        assert walk is not None
        S, value = self.expectation()
        self.walks.newton(S)
        self.walks.learn_base(walk)
        if walk.step_param is not None and self.drift is None and self.passes >= BURN:
            self.walks.learn_step()
        self.passes += 1
        self.history.append(value)
        return value


def run(
    problem: Problem, max_iter: int, tol: float, name: str, callback: Any = None, driver: str = "auto"
) -> tuple[Climb, Meter, str, bool]:
    """Climb until a word's log-likelihood rises by less than `tol`; "batch" and documents on disk remember no document."""
    from .dynamic_streamed import StreamedClimb, some_of

    stopped, converged = "", False
    with deadline_of(problem) as over, Meter() as meter:
        documents = problem.admixture.documents(problem.kwargs)
        streamed = documents.on_disk or driver == "batch"
        some = some_of(documents, problem.seed) if streamed else documents
        drift = best_drift(problem.admixture, some, problem.seed)
        kind = StreamedClimb if streamed else Climb
        run = kind(problem.admixture, documents, problem.seed, drift=drift)
        meter.mark("setup")
        tokens = max(documents.num_tokens, 1.0)
        bar = tqdm(total=max_iter, desc=name, disable=not problem.progress, leave=False)
        with bar:
            while len(run.history) < max_iter:
                value = run.iterate()
                bar.update()
                bar.set_postfix_str(f"{value / tokens:.4f} a word", refresh=False)
                if callback is not None:
                    callback(run.passes, value / tokens, {})
                if run.passes > BURN + 3 and abs(run.history[-1] - run.history[-2]) < tol * tokens:
                    converged = True
                    break
                if over():
                    stopped = over.reason
                    break
        meter.mark("run")
    return run, meter, stopped, converged


def best_drift(form: Admixture, documents: Documents, seed: int) -> float | None:
    """The drift under which documents set aside are foretold best; None where the story fixes it, or they cannot tell."""
    aside, rest = set_aside(documents, seed)
    if form.walk is None or form.walk.step_param is None or aside is None or aside.num_tokens < ENOUGH:
        return None
    halves = aside.halves(np.random.default_rng(seed))
    found: dict[int, float] = {}
    start: Any = None

    def value(i: int) -> float:
        """log p of the second halves of the documents set aside, after a short climb with the i-th drift."""
        nonlocal start
        if not 0 <= i < len(DRIFTS):
            return -np.inf
        if i not in found:
            run = Climb(form, rest, seed, start=start, drift=DRIFTS[i])
            start = run.start
            for _ in range(SHORT):
                run.iterate()
            found[i] = run.foretell(*halves)
        return found[i]

    at = len(DRIFTS) // 2
    way = 1 if value(at + 1) > value(at) else -1
    while value(at + way) > value(at):
        at += way
    return DRIFTS[at]


def parts_of(problem: Problem, run: Climb, count: int) -> dict[str, Tensor]:
    """Everything but the walks as draws."""
    form, walk = run.form, run.form.walk
    assert walk is not None
    draws = learned(problem, form, run.alpha, torch.zeros(1))
    if walk.step_param:
        shape = problem.structure[walk.step_param].shape
        draws[walk.step_param] = torch.full((1, *shape), run.walks.step, dtype=torch.float64)
    if walk.base:
        draws[walk.base] = run.walks.base.double().reshape(1, *problem.structure[walk.base].shape)
    return {n: v.expand(count, *v.shape[1:]).clone() for n, v in draws.items()}


def extra_of(run: Climb) -> dict[str, Any]:
    """Shares of the fitted documents, and standard deviations of the walks, (K, T, V)."""
    variance, _ = run.walks.curvature().spreads()
    sd = variance.sqrt().view_as(run.walks.beta).transpose(0, 1).double().contiguous()
    step = torch.tensor(run.walks.step, dtype=torch.float64)
    kept = {"theta.concentration": (run.n + run.alpha).double()} if len(run.n) else {}
    return {"topics": {**kept, "beta.sd": sd, "step": step}}


def run_em(problem: Problem, em: Any) -> Posterior:
    """Modes of the walks."""
    from ..posterior import Posterior

    climb, meter, stopped, converged = run(problem, em.max_iter, TOL * em.tol, "EM", em.callback, em.driver)
    notes = [stopped] if stopped else []
    if not converged and not stopped:
        notes.append(f"EM did not converge in {em.max_iter} iterations; raise max_iter or tol")
    form = climb.form
    return Posterior(
        kind="point",
        method=em,
        problem=problem,
        draws={
            form.topics: climb.walks.beta.transpose(0, 1).double().contiguous()[None],
            **parts_of(problem, climb, 1),
        },
        history=climb.history,
        diagnostics={"plan": plan(form), "iterations": len(climb.history), "drift": climb.walks.step},
        warnings=notes + want_notes(problem),
        timings=meter.timings,
        converged=converged,
        extra={**extra_of(climb), "keep_labels": True},
    )


def run_svi(problem: Problem, svi: Any) -> Posterior:
    """The Gaussian Markov chain around the modes, by draws."""
    from ..posterior import Posterior

    if svi.checkpoint is not None:
        raise ValueError(
            "SVI(checkpoint=...) is not available for dynamic topic models, which keep no state; leave it out"
        )
    climb, meter, stopped, converged = run(problem, svi.steps, TOL * 1e-6, "SVI")
    form, numbers = climb.form, climb.walks.beta.numel()
    count = max(DRAWS, min(svi.draws, DRAW_NUMBERS // max(1, numbers)))
    beta = torch.empty(count, *climb.walks.beta.transpose(0, 1).shape, dtype=torch.float64)
    chains = climb.walks.curvature()
    for i in range(count):
        beta[i] = (climb.walks.beta + chains.sample().view_as(climb.walks.beta)).transpose(0, 1)
    notes = [stopped] if stopped else []
    points = parts_of(problem, climb, count)
    if points:
        notes.append(
            f"{', '.join(points)} stay at their mode: the bands leave out their uncertainty, and what follows from it"
        )
    return Posterior(
        kind="variational",
        method=svi,
        problem=problem,
        draws={form.topics: beta, **points},
        history=climb.history,
        diagnostics={
            "guide": "gaussian chain over time",
            "mode": "Newton steps",
            "steps": len(climb.history),
            "drift": climb.walks.step,
        },
        warnings=[
            *notes,
            "the guide is a Laplace approximation: bands are those of a Gaussian around the mode, and k-hat is not known",
        ],
        timings=meter.timings,
        converged=converged,
        extra=extra_of(climb),
    )


def forecast(posterior: Posterior, steps: int = 1, draws: int = 0, seed: int = 0) -> Tensor:
    """Topics of a slice never seen, `steps` after the last: (K, V), or (draws, K, V).

    Parameters
    ----------
    posterior
        Of a dynamic topic model.
    draws, seed
        0: the mean topics, where a word's weight is :math:`e^{m + c v / 2}` of a log-normal with the last mode m and the
        variance v of mode and steps; c is `MEAN`, as Laplace variances of words that are hardly seen err upwards.  Slices
        before the last count by powers of `FADES`: what was talked of then may come back.  Otherwise draws of the last slice
        and of the steps after it, whose spread shows how little is known.

    Raises
    ------
    ValueError
        The story has no slices, or `steps` is not positive.
    """
    from .answers import form_of

    form = form_of(posterior)
    if form.walk is None:
        raise ValueError("the story has no slices of time: its topics stand still, and posterior.draws has them")
    if steps < 1:
        raise ValueError(f"steps must be a whole number from 1, got {steps!r}")
    kept = posterior.extra["topics"]
    recent = posterior.draws[form.topics].mean(0)[:, -RECENT:]
    variance = kept["beta.sd"][:, -RECENT:].square() + steps * kept["step"] ** 2
    if draws < 1:
        weights = FADES ** torch.arange(recent.shape[1]).flip(0).to(recent)
        topics = (recent + MEAN * variance / 2).softmax(-1)
        return (topics * (weights / weights.sum())[:, None]).sum(1)
    last, sd = recent[:, -1], variance[:, -1].sqrt()
    noise = torch.empty(draws, *last.shape, dtype=last.dtype).normal_(generator=torch.Generator().manual_seed(seed))
    return (last + sd * noise).softmax(-1)


def forecast_concentration(posterior: Posterior) -> Tensor:
    """Concentrations of the shares in a slice never seen: alpha's total, dealt out as the last slice dealt out its words, (K,).

    The story's own alpha knows no time; topics that have come up lately are likelier in the next slice.
    """
    from .answers import alpha_of
    from .quality import topic_share

    alpha = alpha_of(posterior)
    _, share = topic_share(posterior)
    last = torch.from_numpy(share[-1])
    return 0.9 * alpha.sum() * last + 0.1 * alpha

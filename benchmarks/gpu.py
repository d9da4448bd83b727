"""Five jobs on a card, each beside the same call on that machine's processor and beside what the card can do at all.

gmm     one EM iteration of `GMM`, ten million rows x 16, 16 full components
lda     passes of `LDA`'s EM over Associated Press replicated to fifty million words, and whole fits
vae     a training step of a 784-400-20 VAE at batch 512: recorded, compiled by Inductor, launched as CUDA graphs
hmc     gradients of `HMC` with 256 chains of a logistic regression
stream  the same EM passes with the data in the processor's memory, read ahead and copied, against data on the card

Shares are of figures measured on the same card in the same run: a large copy, a large square product.  Every figure is printed
as soon as it is known, and the JSON grows job by job, so that a run that is cut off leaves what it had.

    python benchmarks/gpu.py [--only gmm,lda] [--data FOLDER] [--budget SECONDS] [--quick --device cpu]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from _gpu import Bench, ap_like, card_in_words, note, replicated, rounds_of, timed, wait
from _mixtures import clusters, our_iterations, our_score, same_start
from _peers import Case, Report, arguments, available_cores, per_iteration

#: Iterations of the short and the long run, and of the long one on small data, whose iterations are short.
SHORT, LONG, QUICK = 2, 12, 42
#: Rows of the part on which card and processor are compared, and its iterations.
PART, PART_ITERATIONS = 50_000, 5


# -- gmm ----------------------------------------------------------------------------------------------------------------


def synchronised(run: Any, device: str) -> Any:
    """The same, back only when the device has finished."""

    def work(iterations: int) -> Any:
        answer = run(iterations)
        wait(device)
        return answer

    return work


def mixture_rows(bench: Bench, rows: int, dtype: str) -> tuple[torch.Tensor, np.ndarray, int]:
    """Rows on the device, a million of them as an array, and K."""
    columns, K = (8, 8) if bench.quick else (16, 16)
    few = clusters(min(rows, 1_000_000), columns, K).astype(dtype)
    where = torch.from_numpy(few).to(bench.device)
    x = where.repeat(-(-rows // len(few)), 1)[:rows].clone()
    x += 0.05 * torch.randn(
        x.shape, dtype=x.dtype, device=bench.device, generator=torch.Generator(bench.device).manual_seed(0)
    )
    return x, few, K


def gmm(case: Case, bench: Bench) -> None:
    """float32 and float64; the log-likelihood is the processor's on a part before a time counts."""
    rows, end = (20_000 if bench.quick else 10_000_000), bench.share
    for dtype in ("float32", "float64"):
        x, few, K = mixture_rows(bench, rows, dtype)
        part, scores = few[:PART].copy(), []
        for where in ("cpu", bench.device):
            posterior = our_iterations(part, "full", K, device=where)(PART_ITERATIONS)
            scores.append(our_score(posterior, PART_ITERATIONS, len(part)))
        limit = 1e-9 if dtype == "float64" else 1e-5
        case.check(f"{dtype}: log-likelihood a row, {bench.device} less cpu", scores[1] - scores[0], limit)
        start = same_start(few, "full", K)[1]
        run = synchronised(our_iterations(x, "full", K, start=start, device=bench.device), bench.device)
        run(1)
        rounds = per_iteration({"it": run}, bench.repeats, SHORT, QUICK if bench.quick else LONG)["it"].rounds
        spent = timed(case, f"{bench.device}, {dtype}", rounds)
        D = x.shape[1]
        work, read = 4.0 * K * (1 + D + D * (D + 1) // 2) * rows, float(x.numel() * x.element_size())
        note(case, f"{dtype}: share of a square product's speed", work / spent / bench.square(x.dtype))
        note(case, f"{dtype}: share of the bandwidth, the rows read once", read / spent / bench.copy())
        note(case, f"{dtype}: rows a second", rows / spent)
        if bench.device == "cuda":
            here = min(rows, len(few))
            cpu = our_iterations(few[:here], "full", K, start=start)
            seconds = per_iteration({"it": cpu}, 1, 1, QUICK if bench.quick else 3)["it"].median
            if here < rows and time.perf_counter() + 8 * seconds * rows / here < end:
                cpu, here = our_iterations(x.cpu(), "full", K, start=start), rows
                seconds = per_iteration({"it": cpu}, 1, 1, 3)["it"].median
            note(case, f"{dtype}: rows that the cpu was timed on", float(here))
            timed(case, f"cpu, {dtype}", [seconds * rows / here])
            note(case, f"{dtype}: cpu / cuda", seconds * rows / here / spent)
        if time.perf_counter() > end:
            break


# -- lda ----------------------------------------------------------------------------------------------------------------


def topic_start(documents: Any, K: int) -> Any:
    """Topics after a short climb on some documents, on the processor."""
    from inference.topics.expected import climb
    from inference.topics.streamed import some_documents

    alpha, eta = torch.full((K,), 0.1), torch.full((documents.num_words, 1), 0.05)
    return climb(some_documents(documents, 300, 0), alpha, eta, max_iter=10, seed=0).state


def lda(case: Case, bench: Bench) -> None:
    """Full passes that keep nothing of a document, passes that keep every word's topic, and a whole fit."""
    from scipy.sparse import csr_matrix

    from inference import EM, fit
    from inference.topics import cards
    from inference.topics.expected import ExpectedCounts, engine
    from inference.topics.streamed import SETTLED, StreamedCounts
    from zoo import LDA

    K, device, end = (5 if bench.quick else 50), torch.device(bench.device), bench.share
    corpus = ap_like(bench.data, bench.quick)
    documents = replicated(corpus, 3e4 if bench.quick else 5e7)
    part = documents.cut(0, min(len(documents), len(corpus[0]) - 1))
    tokens, some = documents.num_tokens, part.num_tokens
    note(case, "words in all", tokens)
    note(case, "K", float(K))
    start = topic_start(part, K)

    ends = [
        [r.full_pass() for _ in range(3)][-1] / some
        for r in (StreamedCounts(part, start.to(d)) for d in ("cpu", device))
    ]
    case.check(f"log-likelihood a word after three full passes, {device} less cpu", ends[1] - ends[0], 1e-6)
    run = StreamedCounts(documents, start.to(device))
    spent = timed(case, f"{device}, full pass", rounds_of(run.full_pass, bench.device, bench.repeats, 1, end))
    tables = (
        2 * (SETTLED + 1) + 10
    )  # of entries x K: rounds read the topics' shares twice; the rest is made, ordered, summed
    note(case, "full pass: share of the bandwidth", 4.0 * K * len(documents.words) * tables / spent / bench.copy())
    note(case, "full pass: words a second", tokens / spent)
    if bench.device == "cuda":
        note(case, "GB on the card", torch.cuda.max_memory_allocated() / 1e9)
        seconds = rounds_of(StreamedCounts(part, start).full_pass, "cpu", 2, 1, end)
        timed(case, "cpu, full pass", [s * tokens / some for s in seconds])
        case.faster("cpu, full pass", side=f"{device}, full pass")
    del run

    alpha, eta = start.alpha.to(device), start.eta.to(device)
    if cards.keeps(documents, cards.SIMILAR * (cards.PLACE_BYTES + 4 * K), device):
        kept = ExpectedCounts(documents, alpha, eta)
        kept.begin(1)
        timed(case, f"{device}, pass that keeps topics", rounds_of(kept.sweep, bench.device, bench.repeats, 1, end))
        del kept
        own = engine(torch.device("cpu"))(part, start.alpha, start.eta)
        own.begin()
        seconds = rounds_of(own.sweep, "cpu", 2, 1, end)
        timed(case, "cpu, pass that keeps topics (one thread)", [s * tokens / some for s in seconds])
        case.faster("cpu, pass that keeps topics (one thread)", side=f"{device}, pass that keeps topics")

    for side, docs in (("cpu", part), (bench.device, documents)):
        table = csr_matrix((docs.counts.astype(np.int64), docs.words, docs.starts), shape=(len(docs), docs.num_words))
        method, left = EM(restarts=1, max_iter=4 if bench.quick else 20, tol=0.0), max(5.0, end - time.perf_counter())
        work = partial(fit, LDA(K), table, method, seed=0, device=side, progress=False, budget=left)
        seconds = rounds_of(work, bench.device, 1, 0)[0]
        words = docs.num_tokens
        note(case, f"whole fit of at most {method.max_iter} passes, {words:.3g} words, {side}, s", seconds)
        note(case, f"whole fit, {side}, seconds a million words", 1e6 * seconds / words)


# -- vae ----------------------------------------------------------------------------------------------------------------


def vae(case: Case, bench: Bench) -> None:
    """Each way to make a step, timed in blocks; one that fails says why, and the others go on."""
    from svi_step import PIXELS, VAE

    from inference import SVI
    from inference.methods.ascent import Ascent
    from inference.methods.paired import PairTarget
    from inference.problem import prepare

    batch, block = (64, 5) if bench.quick else (512, 100)
    x = (torch.rand(8 * batch, PIXELS, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    weights = PIXELS * 400 + 400 * 40 + 20 * 400 + 400 * PIXELS
    sides = [(bench.device, m) for m in ("graph", "inductor", "cudagraph")]
    sides = [*sides, ("cpu", "graph"), ("cpu", "inductor")] if bench.device == "cuda" else sides[:1]
    for device, mode in sides:
        try:
            problem = prepare(VAE(), x, seed=0, device=device)
            with problem.scope(0):
                target, options = PairTarget(problem, 1, batch, mode), SVI(lr=1e-3)
                ascent = Ascent(target, target.start(), options.lr, 10**9, options.tol, options.patience)

                def steps(step: Any = ascent.step) -> None:
                    for _ in range(block):
                        step()

                rounds = rounds_of(steps, device, bench.repeats, 1, bench.share)
        except Exception as error:  # a mode that this machine cannot run is told, with the others' times
            note(case, f"{device}, {mode}", f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
            continue
        if target.mode != mode:
            note(case, f"{device}, {mode}", f"became {target.mode}: {target.reason}")
            continue
        spent = timed(case, f"{device}, {mode}", [r / block for r in rounds])
        if device == bench.device:
            note(
                case,
                f"{mode}: share of a square product's speed",
                6.0 * batch * weights / spent / bench.square(torch.float32),
            )
            note(case, f"{mode}: rows a second", batch / spent)
    if bench.device == "cuda" and {"cpu, graph", "cuda, graph"} <= set(case.times):
        case.faster("cpu, graph", side="cuda, graph")


# -- hmc ----------------------------------------------------------------------------------------------------------------


def logistic(X: torch.Tensor, y: torch.Tensor) -> None:
    """Regression of a coin on columns of numbers."""
    import pyro
    import pyro.distributions as dist

    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=X @ w), obs=y)


def hmc(case: Case, bench: Bench) -> None:
    """Seconds of a gradient of all chains, and draws that agree within their error."""
    from inference import HMC, fit

    N, D, chains = (200, 4, 16) if bench.quick else (5000, 20, 256)
    warmup, draws = (20, 10) if bench.quick else (100, 50)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N, D))
    y = (rng.random(N) < 1 / (1 + np.exp(-X @ rng.standard_normal(D) / D**0.5))).astype(float)
    means, end = {}, bench.share
    for device in dict.fromkeys((bench.device, "cpu")):
        left = max(5.0, end - time.perf_counter())
        method = HMC(chains=chains, warmup=warmup, draws=draws)
        posterior = fit(logistic, {"X": X, "y": y}, method, seed=0, device=device, progress=False, budget=left)
        steps, reached = posterior.sample_stats["n_steps"][0], posterior.sample_stats["n_steps"].shape[1]
        note(case, f"{device}: draws a chain", float(reached))
        note(case, f"{device}: seconds of set-up and warm-up", posterior.timings["setup"] + posterior.timings["warmup"])
        if reached < 2:
            note(case, f"{device}", "the time was over before the warm-up was")
            continue
        means[device] = posterior.draws["w"].mean(0)
        spent = timed(case, device, [posterior.timings["run"] / float(steps.sum())])
        if device == bench.device:
            work = 4.0 * N * D * chains
            note(case, "share of a square product's speed, float64", work / spent / bench.square(torch.float64))
        else:
            case.faster("cpu", side=bench.device)
            gap = float((means[device] - means[bench.device]).abs().max()) if bench.device in means else float("inf")
            case.check("largest difference of posterior means, cuda less cpu", gap, 0.02)


# -- stream -------------------------------------------------------------------------------------------------------------


@contextmanager
def no_room() -> Iterator[None]:
    """Inside, no data stay on the card."""
    from inference import streaming

    before, streaming.SHARE = streaming.SHARE, 1e-9
    try:
        yield
    finally:
        streaming.SHARE = before


def stream(case: Case, bench: Bench) -> None:
    """EM of a mixture and of topics, resident and streamed in turns; on the processor there is nothing to stream."""
    from inference.topics.streamed import StreamedCounts

    rows, rate = (20_000 if bench.quick else 10_000_000), {}
    x, few, K = mixture_rows(bench, rows, "float32")
    host, start = x.cpu(), same_start(few, "full", K)[1]
    del x
    run = synchronised(our_iterations(host, "full", K, start=start, device=bench.device), bench.device)
    for name, room in (("resident", nullcontext), ("streamed", no_room)):
        with room():
            run(1)
            rounds = per_iteration({"it": run}, bench.repeats, SHORT, QUICK if bench.quick else LONG)["it"].rounds
        rate[name] = timed(case, f"mixture, {name}", rounds)
    case.goal("mixture: streamed rate as a share of the resident", rate["resident"] / rate["streamed"], 0.8)

    topics, end = (5 if bench.quick else 50), bench.share
    corpus = ap_like(bench.data, bench.quick)
    documents = replicated(corpus, 3e4 if bench.quick else 5e7)
    first, found = topic_start(documents.cut(0, len(corpus[0]) - 1), topics).to(torch.device(bench.device)), {}
    for name, room in (("resident", nullcontext), ("streamed", no_room)):
        with room():
            counts = StreamedCounts(documents, first)
        values = []
        rounds = rounds_of(lambda c=counts, v=values: v.append(c.full_pass()), bench.device, 2, 1, end)
        rate[name], found[name] = timed(case, f"topics, {name}", rounds), values[0] / documents.num_tokens
        note(case, f"topics, {name}: stays on the card", str(counts.visits.stays))
        del counts
    case.check(
        "topics: log-likelihood a word of the first pass, streamed less resident",
        found["streamed"] - found["resident"],
        1e-6,
    )
    case.goal("topics: streamed rate as a share of the resident", rate["resident"] / rate["streamed"], 0.8)


JOBS = {"gmm": gmm, "lda": lda, "vae": vae, "hmc": hmc, "stream": stream}
UNITS = {"gmm": "iteration", "lda": "pass", "vae": "step", "hmc": "gradient of all chains", "stream": "pass"}


def main() -> int:
    """Job after job, sharing the budget."""
    began = time.perf_counter()
    options = arguments(
        __doc__, repeats=3, device=True, data="folder with docs.ldac; without it, a made-up corpus of its size",
        budget=540.0, threads=available_cores(),
    )  # fmt: skip
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is here: nothing was measured (--device cpu tries the script out)")
        return 0
    wanted = [name.strip() for name in options.only.split(",") if name.strip()] or list(JOBS)
    if unknown := [name for name in wanted if name not in JOBS]:
        print(f"--only {options.only}: {', '.join(unknown)} is no job; there are {', '.join(JOBS)}")
        return 2
    report = Report(__file__, options)
    if options.device == "cuda":
        report.machine["gpu"] = card_in_words()
        print(report.machine["gpu"], flush=True)
    bench = Bench(options.device, options.quick, options.repeats, began + options.budget, data=options.data)
    for i, name in enumerate(wanted):
        bench.jobs = len(wanted) - i
        if time.perf_counter() > bench.until:
            print(f"{name}: the budget of {options.budget:g} s is used up", flush=True)
            continue
        with report.case(name, unit=UNITS[name]) as case:
            JOBS[name](case, bench)
            note(case, "copy, GB/s read and written", bench.copy() / 1e9)
            note(case, "square product of float32, TFLOP/s", bench.square(torch.float32) / 1e12)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return report.end() if report.cases else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Simulation-based calibration of samplers on five stories, and of planted errors that it has to see.

    python benchmarks/calibration.py                    # 500 simulations a case; writes calibration.json beside the script
    python benchmarks/calibration.py --quick            # 20 simulations, writes nothing: does it still run?
    python benchmarks/calibration.py --only hmm         # cases whose name contains the text; --simulations N; --json PATH

A right sampler's ranks are even in every quantity, the log likelihood of the data among them, at Holm's p > .001; with each
planted error those of some quantity are not. The status is 1 where a case ends otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch

from inference import NUTS, Gibbs, Posterior, Verdict, check
from zoo import LDA, PPCA, CategoricalHMM


def normal(x: torch.Tensor) -> None:
    """Normal with unknown mean and precision, conjugate."""
    precision = pyro.sample("precision", dist.Gamma(3.0, 2.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0 / precision.sqrt()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0 / precision.sqrt()), obs=x)


def mixture(x: torch.Tensor) -> None:
    """Two components in order, summed out."""
    share = pyro.sample("share", dist.Beta(3.0, 3.0))
    low = pyro.sample("low", dist.Normal(-1.0, 1.0))
    gap = pyro.sample("gap", dist.Gamma(4.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(low + gap * z, 0.6), obs=x)


SAMPLER = NUTS(chains=2, warmup=400, draws=1000)


@dataclass(frozen=True)
class Wrong:
    """NUTS with an error planted into its answer."""

    change: Callable[[Any], Posterior] = field(repr=False)
    name: ClassVar[str] = "nuts"

    def check(self, structure: Any) -> Verdict:
        """As NUTS."""
        return SAMPLER.check(structure)

    def run(self, problem: Any) -> Posterior:
        """The wrong answer."""
        return self.change(problem)


def changed(change: Callable[[dict[str, torch.Tensor], Posterior], dict[str, torch.Tensor]]) -> Wrong:
    """NUTS whose draws are changed."""

    def run(problem: Any) -> Posterior:
        found = SAMPLER.run(problem)
        return replace(found, draws={**found.draws, **change(found.draws, found)})

    return Wrong(run)


def narrow(draws: dict[str, torch.Tensor], _: Posterior) -> dict[str, torch.Tensor]:
    return {n: v.mean(0) + 0.8 * (v - v.mean(0)) for n, v in draws.items()}


def prior(draws: dict[str, torch.Tensor], found: Posterior) -> dict[str, torch.Tensor]:
    own = [found.joint.prior_draw() for _ in range(found.num_draws)]
    return {n: torch.stack([d[n] for d in own]) for n in draws}


def stuck(draws: dict[str, torch.Tensor], found: Posterior) -> dict[str, torch.Tensor]:
    half = found.num_draws // found.chains
    return {n: torch.cat([v[:1].expand(half, *v.shape[1:]), v[half:]]) for n, v in draws.items()}


def swapped(draws: dict[str, torch.Tensor], _: Posterior) -> dict[str, torch.Tensor]:
    return {"share": 1 - draws["share"]}


def batch(problem: Any) -> Posterior:
    """Half of the rows, taken for all of them: the weight N / B is forgotten."""
    kwargs = {"x": problem.kwargs["x"][: len(problem.kwargs["x"]) // 2]}
    return replace(SAMPLER.run(problem.over(kwargs)), problem=problem)


def no_jacobian() -> AbstractContextManager[Any]:
    """Densities of free values without the term that makes them densities."""
    return patch("inference.joint.log_jacobian", lambda transform, free, value: torch.zeros(()))


GENERATOR = torch.Generator().manual_seed(0)
ROWS, PAIRS, TRIPLES = torch.zeros(8), torch.zeros(25), torch.randn(20, 3, generator=GENERATOR)
CHAINS = torch.randint(0, 3, (6, 8), generator=GENERATOR)
WORDS = torch.full((5, 6), 2)


@dataclass(frozen=True)
class Case:
    """A method on a story, and whether its ranks should be even."""

    name: str
    story: Any
    data: Any
    method: Any
    even: bool = True
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


CASES = (
    Case("conjugate normal, NUTS", normal, ROWS, SAMPLER),
    Case("ordered two-component mixture, NUTS", mixture, PAIRS, SAMPLER),
    Case("PPCA up to rotation, NUTS", PPCA(1), TRIPLES, SAMPLER),
    Case("categorical HMM, NUTS", CategoricalHMM(num_states=2, num_symbols=3), CHAINS, SAMPLER),
    Case("tiny LDA, Gibbs", LDA(2, 0.5, 0.5), {"w": WORDS}, Gibbs(chains=2, warmup=100, draws=500)),
    Case("planted: dropped Jacobian", normal, ROWS, SAMPLER, False, no_jacobian),
    Case("planted: forgotten N/B", normal, ROWS, Wrong(batch), False),
    Case("planted: prior draws for the posterior", normal, ROWS, changed(prior), False),
    Case("planted: sd x 0.8", normal, ROWS, changed(narrow), False),
    Case("planted: one chain stuck", normal, ROWS, changed(stuck), False),
    Case("planted: swapped labels", mixture, PAIRS, changed(swapped), False),
)


def judged(case: Case, simulations: int) -> dict[str, Any]:
    """One case in numbers."""
    began = time.perf_counter()
    with case.around():
        found = check(case.story, case.data, case.method, simulations=simulations, seed=1)
    least = min(found.adjusted, key=lambda n: found.adjusted[n])
    return {
        "case": case.name,
        "simulations": simulations,
        "quantities": len(found.ranks),
        "smallest adjusted p": found.adjusted[least],
        "of": least,
        "log likelihood p": found.p_values["log likelihood"],
        "wrong": found.wrong,
        "as it should be": found.passed == case.even,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    """A line for each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--simulations", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for case in CASES:
        if options.only.lower() not in case.name.lower():
            continue
        result = judged(case, 20 if options.quick else options.simulations)
        results.append(result)
        verdict = "even" if not result["wrong"] else f"uneven in {', '.join(result['wrong'][:3])}"
        print(
            f"{case.name:<40} {result['simulations']} simulations, {result['quantities']} quantities: smallest adjusted p "
            f"{result['smallest adjusted p']:.2g} ({result['of']}), log likelihood p {result['log likelihood p']:.2g}; "
            f"{verdict}{'' if result['as it should be'] else '  <- NOT AS IT SHOULD BE'}  ({result['seconds']:.0f} s)",
            flush=True,
        )
    right = sum(r["as it should be"] for r in results)
    print(f"{right} of {len(results)} cases end as they should")
    path = options.json or (None if options.quick or options.only else Path(__file__).with_suffix(".json"))
    if path is not None:
        path.write_text(json.dumps({"benchmark": "calibration", "results": results}, indent=1) + "\n", encoding="utf-8")
    return int(not options.quick and right < len(results))


if __name__ == "__main__":
    sys.exit(main())

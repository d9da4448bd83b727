"""Large data: what is read how often, what is left out and why, and that pieces add up to the whole."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import EM, SVI, compare, fit, foresight
from inference.arviz_io import TooManyError, elpd_loo
from inference.handlers import Multinomial
from inference.methods import NUTS
from inference.methods.batches import JUDGED
from inference.recorder import pure_graph
from zoo import GMM, PPCA


class Counting:
    """A regression that notes how many rows it was told on."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __deepcopy__(self, memo: dict) -> "Counting":
        return self

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        self.seen.append(len(x))
        b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.param("b.loc", torch.zeros(x.shape[1]))
        scale = pyro.param("b.scale", 0.1 * torch.ones(x.shape[1]), constraint=dist.constraints.positive)
        pyro.sample("b", dist.Normal(loc, scale).to_event(1))


def test_batches_never_tell_the_story_on_all_rows() -> None:
    """A story that learns nothing was told on all rows once a start: minutes and gigabytes for a mixture of a million."""
    torch.manual_seed(0)
    x = torch.randn(JUDGED + 20_000, 2, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -1.0], dtype=torch.float64) + torch.randn(len(x), dtype=torch.float64)
    story = Counting()
    posterior = fit(
        story, {"x": x, "y": y}, SVI(steps=500, batch_size=512, draws=200, starts=1), seed=0, progress=False
    )
    assert max(story.seen) <= JUDGED
    ols = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    assert torch.allclose(posterior.draws["b"].mean(0), ols, atol=0.05)


def test_rows_with_latents_are_judged_on_some_and_answered_when_asked() -> None:
    """Draws of a latent for every row were kept, 25 times the data, before anybody asked for one."""
    torch.manual_seed(1)
    W = torch.tensor([[1.0, 0.5, -0.5]], dtype=torch.float64)
    x = torch.randn(JUDGED + 1000, 1, dtype=torch.float64) @ W + 0.3 * torch.randn(
        JUDGED + 1000, 3, dtype=torch.float64
    )
    posterior = fit(PPCA(1), x, SVI(steps=30, batch_size=512, draws=50, starts=1), seed=0, progress=False)
    assert set(posterior.draws) == {"W", "mu", "psi"}
    assert posterior.local("z", x[:5]).shape[1:] == (5, 1)
    assert np.isfinite(posterior.diagnostics["elbo"])


def test_many_numbers_are_taken_in_batches_unless_told_otherwise() -> None:
    """SVI took ten million rows in every step where no batch was named."""
    from inference.problem import prepare

    big, small = (prepare(GMM(2), torch.randn(n, 2), seed=0) for n in (2_100_000, 10_000))
    assert SVI().settled(big).batch_size == 1024
    assert SVI().settled(small).batch_size is None
    assert SVI(batch_size=None).settled(big).batch_size is None


def test_slope_of_one_repeated_row_is_not_set_among_zeros() -> None:
    """The gradient of many documents' multinomial filled states x documents x words with zeros in every step."""
    torch.manual_seed(2)
    x = torch.randint(0, 4, (6, 5)).double()
    logits = torch.randn(3, 5, dtype=torch.float64)

    def slope(free: Tensor) -> Tensor:
        with torch.enable_grad():
            free = free.detach().requires_grad_()
            probs = free.softmax(-1)[:, None].expand(3, 6, 5)
            fn = dist.Multinomial(9, probs=probs, validate_args=False)
            fn.__class__ = Multinomial
            return torch.autograd.grad(fn.log_prob(x).sum(), free)[0]

    graph = pure_graph(slope, (logits,))
    names = [str(node.target) for node in graph.module.graph.nodes]
    assert not any("slice_backward" in name for name in names)
    # by hand: sum over rows of x_nv - (sum_v x_nv) p_kv
    wanted = x.sum(0) - x.sum() * logits.softmax(-1)
    assert torch.allclose(graph(logits), wanted, atol=1e-12)
    assert torch.allclose(slope(logits), wanted, atol=1e-12)


def test_guess_of_precisions_is_recorded() -> None:
    """Every step of a mixture's own guide ran through Pyro, because a Wishart looked at its degrees of freedom."""
    x = GMM(2).example()[1]["x"]
    found = fit(GMM(2), x, SVI(steps=5, draws=25), seed=0, progress=False)
    assert found.diagnostics["mode"] != "eager", found.diagnostics["reason"]


def test_comparison_leaves_out_a_sampler_that_cannot_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` waited for hours; with a budget, or configured by the user, the sampler runs all the same."""
    x = GMM(2).example()[1]["x"][:60]
    monkeypatch.setattr(foresight, "LONGEST", 1e-6)
    monkeypatch.setattr(foresight, "NEAR", 1.0)
    found = compare(GMM(2), x, ["em", "nuts"], progress=False, cross_check=False)
    assert found.table.loc["nuts", "kind"] == "n/a (refused)"
    assert "budget" in found.refused["nuts"] and "NUTS would take about" in found.refused["nuts"]
    short = compare(GMM(2), x, [EM(), NUTS(chains=2, warmup=60, draws=60)], progress=False, cross_check=False)
    assert short.posteriors["nuts"].kind == "samples"


def test_timed_rows_stand_for_all() -> None:
    """The pilot of NUTS told the story on all rows; a part of them, weighed, says as much."""
    from inference.problem import prepare

    problem = prepare(GMM(2), torch.randn(20_000, 2), seed=0)
    some, share = foresight.part(problem, 4_000)
    assert share == 5.0 and some.structure.num_rows == 4_000
    assert foresight.part(problem, 30_000) == (problem, 1.0)


def test_pieces_of_rows_give_the_densities_and_states_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows were held under all draws at once; in pieces every row has the same density, error and states."""
    from inference import joint, score

    x = GMM(2).example()[1]["x"]
    posterior = fit(GMM(2), x, SVI(steps=20, draws=40), seed=0, progress=False)
    whole, states = posterior.score(), posterior.local("z")
    monkeypatch.setattr(joint, "PIECE_ROWS", 64)
    monkeypatch.setattr(joint, "PIECE_ELEMENTS", 1)
    pieces = posterior.score()
    assert len(posterior.joint.pieces(posterior.problem.kwargs)) > 1
    assert torch.allclose(pieces.rows, whole.rows, atol=1e-10)
    assert torch.allclose(pieces.monte_carlo_error, whole.monte_carlo_error, atol=1e-10)
    assert torch.allclose(posterior.local("z"), states, atol=1e-12)
    monkeypatch.setattr(score, "FEW_DRAWS_FROM", 100)
    monkeypatch.setattr(score, "DRAWS_BY_ROWS", 1)
    assert f"mean over {score.LEAST} draws" in posterior.score().estimator
    assert "mean over 30 draws" in posterior.score(draws=30).estimator  # what is asked for is done


def test_leave_one_out_takes_fewer_draws_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison asked every word of a corpus under a thousand draws."""
    from inference import arviz_io

    x = GMM(2).example()[1]["x"]
    posterior = fit(GMM(2), x, SVI(steps=400, draws=1000), seed=0, progress=False)
    full = elpd_loo(posterior)
    monkeypatch.setattr(arviz_io, "LOO_NUMBERS", 250 * x.numel())
    thinned = elpd_loo(posterior)
    assert abs(thinned[0] - full[0]) < 0.05 * full[1]
    monkeypatch.setattr(arviz_io, "LOO_NUMBERS", 10 * x.numel())
    with pytest.raises(TooManyError, match="240 draws"):
        elpd_loo(posterior)


def test_what_cannot_be_held_is_refused_and_pictures_show_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions for all rows under all draws filled the memory; a scatter of all rows took minutes."""
    from inference import plots, predict

    x = GMM(2).example()[1]["x"]
    posterior = fit(GMM(2), x, EM(restarts=1), seed=0, progress=False)
    monkeypatch.setattr(plots, "SCATTERED", 50)
    figure = posterior.plot_data()
    assert len(figure.axes[0].collections[0].get_offsets()) == 50
    monkeypatch.setattr(predict, "HELD", 100)
    with pytest.raises(ValueError, match="fewer draws"):
        posterior.predict(x)

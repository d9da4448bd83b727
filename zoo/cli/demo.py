"""The whole way on real data: story, structure, choice of a method, three methods side by side."""

import time
from pathlib import Path
from typing import Any

from ..imports import bring


def run(folder: Path, *, seed: int | None = 0, progress: bool | None = None) -> Any:
    """Fit a mixture of three Gaussians to Fisher's irises with EM, SVI and NUTS.

    Parameters
    ----------
    folder
        Where the plate diagram, the figure and the report go; made if it does not exist.
    seed
        Of every random choice.
    progress
        Progress bars; None shows them on a terminal.

    Returns
    -------
    The comparison of the three methods.
    """
    from inference import choose, compare, draw_plates, inspect, story_text

    from .. import GMM, load

    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    irises = load("iris")
    story = GMM(num_components=3, covariance="diag")

    _heading("The story: every iris picks a species, then its four measurements")
    print(story_text(story, irises.x))
    figure = folder / "plate.png"
    draw_plates(story, irises.x, title="GMM on the irises").savefig(figure, dpi=150)

    _heading("What inference reads off it")
    structure = inspect(story, irises.x)
    print(structure)

    _heading("Which method, and why")
    print(choose(structure))

    _heading("Three methods on the same rows, compared on rows that they have not seen")
    comparison = compare(story, irises.x, methods=("em", "svi", "nuts"), test=0.2, seed=seed, progress=progress)
    print(comparison)
    print("\nadjusted Rand index of the clusters with the species, which no method saw")
    for name, posterior in comparison.posteriors.items():
        print(f"  {name:<5} {_agreement(posterior, irises):.2f}")

    comparison.plot().savefig(folder / "compare.png", dpi=150)
    comparison.report(folder / "report.html")
    _heading(f"Done in {time.perf_counter() - start:.0f} s")
    for name, what in (
        ("plate.png", "the story as a plate diagram"),
        ("compare.png", "the methods side by side"),
        ("report.html", "everything on one page"),
    ):
        print(f"  {folder / name}  {what}")
    return comparison


def _agreement(posterior: Any, dataset: Any) -> float:
    """Adjusted Rand index (Hubert & Arabie, 1985): 1 is the same clustering, 0 what chance gives."""
    adjusted_rand_score = bring("sklearn.metrics").adjusted_rand_score
    clusters = posterior.local("z", dataset.x).argmax(-1)
    return float(adjusted_rand_score(dataset.labels.numpy(), clusters.cpu().numpy()))


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")

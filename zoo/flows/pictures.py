"""How a flow bends its noise, one layer after the other."""

from __future__ import annotations

from typing import Any

import torch

from .story import FlowStory

#: Panels of a figure, the noise and the last layer among them.
PANELS = 8


def draw_layers(story: FlowStory, num: int = 2000, seed: int = 0) -> Any:
    """Noise in the plane after each layer on its way to the data; every dot keeps the colour of its direction in the noise.

    Parameters
    ----------
    story
        A flow over two columns without context.
    num, seed
        Dots, and what they are drawn with.

    Returns
    -------
    Figure.

    Raises
    ------
    ValueError
        The story has other than two columns, or a context.
    """
    from matplotlib.figure import Figure

    if story.event_shape != (2,) or story.num_context:
        raise ValueError(f"layers are drawn for two columns without context, got rows {story.event_shape} of {story!r}")
    outwards = story.direction == "to_data"
    layers = list(story.flow.transforms) if outwards else list(reversed(story.flow.transforms))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        z = story.noise().sample((num,))
        steps = [("noise", z)]
        for number, layer in enumerate(layers, 1):
            z = (layer.forward if outwards else layer.inverse)(z, None)[0]  # type: ignore[operator]
            steps.append((f"after {number} of {len(layers)} layers", z))
    if len(steps) > PANELS:
        steps = [steps[round(i * (len(steps) - 1) / (PANELS - 1))] for i in range(PANELS)]
    hue = torch.atan2(steps[0][1][:, 1], steps[0][1][:, 0]).cpu().numpy()
    rows = 1 if len(steps) <= 5 else 2
    columns = -(-len(steps) // rows)
    figure = Figure(figsize=(2.4 * columns, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (title, dots) in zip(panels, steps):
        ax.scatter(dots[:, 0].cpu(), dots[:, 1].cpu(), c=hue, s=3, lw=0, cmap="twilight")
        ax.set_title(title, fontsize=9, loc="left")
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels[len(steps) :]:
        ax.set_visible(False)
    return figure

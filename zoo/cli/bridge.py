"""Where a story from the command line meets inference: its data, its methods, its rows."""

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .faults import CommandError, UsageError
from .stories import FoundStory
from .terminal import note


def check_methods(names: Sequence[str]) -> None:
    """Refuse names of methods that do not exist, before any data are read.

    Raises
    ------
    UsageError
        No names, or an unknown one; the message lists those that exist.
    """
    from inference.methods import METHODS, resolve

    if not names:
        raise UsageError(f"no method named; there are {', '.join(METHODS)}")
    for name in names:
        try:
            resolve(name)
        except ValueError as error:
            raise UsageError(str(error)) from None


def fill_arguments(found: FoundStory, data: str | None, columns: str | None, quiet: bool = True) -> dict[str, Any]:
    """The story's arguments, with data and settings; of two ways to give one column, the one that runs.

    Parameters
    ----------
    found
        The story.
    data
        File or data set; None for the example of a zoo story.
    columns
        Names separated by commas; None for all.
    quiet
        Whether to keep the shapes of the data to ourselves.

    Raises
    ------
    CommandError, UsageError
        As `read_data` and `arguments_from`; or there are no data.
    """
    from .tables import arguments_from, read_data, stored_arguments

    if data is None:
        if found.example is None:
            raise UsageError(f"{found.label} needs data: add --data FILE")
        return {**found.settings, **found.example}
    if columns is None and (stored := stored_arguments(found.story, data)):
        return {**found.settings, **stored}
    dataset = read_data(data, columns.split(",") if columns else None)
    ways = [{**found.settings, **way} for way in arguments_from(dataset, found.arguments, found.label)]
    chosen = ways[0] if len(ways) == 1 else _first_that_runs(found, ways)
    if not quiet:
        shapes = [f"{name} {tuple(value.shape)}" for name, value in chosen.items() if hasattr(value, "shape")]
        note(f"{data}: {', '.join(shapes)}")
    return chosen


def _first_that_runs(found: FoundStory, ways: list[dict[str, Any]]) -> dict[str, Any]:
    from inference import inspect

    errors = []
    for way in ways:
        try:
            inspect(found.story, way)
        except Exception as error:
            errors.append(error)
        else:
            return way
    raise errors[0]


def require_arguments(found: FoundStory, arguments: Sequence[str]) -> None:
    """Refuse to run a story without the arguments that it has no default for.

    Raises
    ------
    UsageError
        Names what is lacking.
    """
    lacking = [name for name, needed in found.arguments.items() if needed and name not in arguments]
    if lacking:
        raise UsageError(f"{found.label} cannot run without {' and '.join(lacking)}: add --data FILE")


def dream_rows(found: FoundStory, num_data: int | None, covariates: str | None, seed: int | None) -> dict[str, Any]:
    """One draw of every site that has a value a row.

    Parameters
    ----------
    found
        The story.
    num_data
        Number of rows; None leaves it to the story.
    covariates
        File or data set with what the story conditions on and does not sample.
    seed
        Of the draw; None takes one from the operating system and says which.

    Returns
    -------
    Site -> (N, *event) tensor.

    Raises
    ------
    CommandError
        The story has no rows to write.
    UsageError
        It has no argument `num_data`, or lacks covariates.
    """
    from inference import inspect, simulate

    arguments = dict(found.settings)
    if num_data is not None:
        if "num_data" not in found.parameters:
            raise UsageError(f"{found.label} has no argument num_data; its arguments are {list(found.parameters)}")
        arguments["num_data"] = num_data
    if covariates is not None:
        given = fill_arguments(found, covariates, None)
        arguments |= {name: given[name] for name, needed in found.arguments.items() if needed and name in given}
    require_arguments(found, list(arguments))
    if seed is None:  # a fresh process would draw the same rows every time
        seed = secrets.randbelow(2**31)
        note(f"seed {seed}")
    draw = simulate(found.story, seed=seed, **arguments)
    seen = {name: draw[name] for name in found.arguments if name in draw}
    if not seen:
        raise CommandError(f"{found.label} samples none of its arguments {list(found.arguments)}: no rows")
    structure = inspect(found.story, {**arguments, **seen})
    return {site.name: draw[site.name] for site in structure.sites if site.local and site.name in draw}


def load_rows(found: FoundStory, path: Path, num_data: int | None, seed: int | None) -> dict[str, Any]:
    """New rows from a posterior that `Posterior.save` wrote: site -> (N, *event) tensor."""
    from inference import load

    return load(path, found.story).sample(100 if num_data is None else num_data, seed=seed)

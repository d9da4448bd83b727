"""The `zoo` command: the one place where stories and inference meet.

Commands import what they need when they run, so that `zoo --help` answers at once.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from . import __version__
from .cli.bridge import check_methods, dream_rows, fill_arguments, load_rows, require_arguments
from .cli.faults import FAULT, INTERRUPTED, USAGE, UsageError, describe
from .cli.stories import file_of, find_story, parse_settings
from .cli.terminal import check_writable, counting_interrupts, first_rank_speaks, leads, terse_warnings

app = App(
    name="zoo",
    help="Generative stories as Pyro programs, and every inference that answers them.",
    help_epilogue="STORY is a name from `zoo list`, or file.py:name for your own function, class or object.",
    version=__version__,
    default_parameter=Parameter(negative=""),
    error_formatter=lambda error: f"zoo: {error}",
    suppress_keyboard_interrupt=False,
)

Columns = Annotated[str | None, Parameter(help="Columns to use, separated by commas.")]
Data = Annotated[str | None, Parameter(help="CSV, TSV, Parquet, NPY or NPZ file, or a name from `zoo list`.")]
Quiet = Annotated[bool, Parameter(help="No progress bars and no notes.")]
Seed = Annotated[int | None, Parameter(validator=Number(gte=0), help="The same seed gives the same numbers.")]
Settings = Annotated[
    list[str] | None,
    Parameter(name="--set", consume_multiple=True, help="Hyperparameters: --set num_components=3 scale=2"),
]
Want = Literal["auto", "posterior", "point"]


@app.command(name="list")
def list_() -> None:
    """What there is: stories by chapter, data sets."""
    from .cli.terminal import print_catalog

    print_catalog()


@app.command
def show(story: str, /, *, data: Data = None, columns: Columns = None, set_: Settings = None,
         plate: Path | None = None, view: str = "plain", latex: bool = False) -> None:  # fmt: skip
    """A story: what it says, how it runs, its sizes, its plate diagram.

    Parameters
    ----------
    story
        Name, or file.py:name.
    plate
        Draw the plate diagram into this file: .png, .svg, .pdf; .dot (Graphviz) or .mmd (Mermaid) for its text.
    view
        What the diagram shows besides: scope, guide, or what a method does (exact, em, gibbs, nuts, hmc, svi).
    latex
        Print the story as LaTeX, and nothing else.
    """
    from inference import draw_plates, inspect, story_density, story_latex, story_text, to_graphviz, to_mermaid

    as_text = {".dot": to_graphviz, ".mmd": to_mermaid}
    if plate:
        check_writable(plate, (".png", ".svg", ".pdf", *as_text))
    found = find_story(story, parse_settings(set_), example_settings=True)
    seen = data is not None or found.example is not None
    arguments = fill_arguments(found, data, columns) if seen else dict(found.settings)
    require_arguments(found, list(arguments))
    if latex:
        print(story_latex(found.story, **arguments))
        return
    print(*filter(None, [found.label, found.text, "As it runs"]), sep="\n\n", end="\n\n")
    print(story_text(found.story, **arguments))
    print(f"\n{story_density(found.story, **arguments)}")
    if seen:
        print()
        print(inspect(found.story, arguments))
    if plate:
        if plate.suffix.lower() in as_text:
            plate.write_text(as_text[plate.suffix.lower()](found.story, **arguments), encoding="utf-8")
        else:
            own = found.guide if view == "guide" else None
            draw_plates(found.story, title=found.label, view=view, guide=own, **arguments).savefig(plate)
        print(f"\nplate diagram: {plate}")


@app.command
def gallery(*, output: Annotated[Path, Parameter(alias="-o")] = Path("gallery.png"), bare: bool = False,
            view: str = "plain") -> None:  # fmt: skip
    """Every story of the zoo on one contact sheet.

    Parameters
    ----------
    output
        Picture (.png, .svg, .pdf).
    bare
        The diagrams alone, without the mathematics beside them.
    view
        "scope" colours local and global latents.
    """
    from inference import draw_sheet

    from .catalog import examples

    check_writable(output, (".png", ".svg", ".pdf"))
    if view not in ("plain", "scope"):
        raise UsageError(f"--view {view}: a sheet of all stories shows plain or scope")
    stories = examples()
    draw_sheet(stories, show_lines=not bare, view=view).savefig(output, dpi=110)
    print(f"{len(stories)} stories: {output}")


@app.command
def check(story: str, /, *, data: Data = None, columns: Columns = None, set_: Settings = None) -> None:
    """Whether a story and data can be fitted: structure, cost, every method with its reason.

    Parameters
    ----------
    story
        Name, or file.py:name.
    """
    from inference import choose, inspect

    found = find_story(story, parse_settings(set_), example_settings=data is None)
    structure = inspect(found.story, fill_arguments(found, data, columns))
    print(structure)
    print(f"data: {structure.data_bytes:,} bytes in memory\n")
    print(choose(structure))


@app.command
def fit(
    story: str,
    /,
    *,
    data: Data = None,
    columns: Columns = None,
    method: str = "auto",
    want: Want = "auto",
    set_: Settings = None,
    seed: Seed = None,
    save: Path | None = None,
    cross_check: bool = False,
    quiet: Quiet = False,
) -> None:
    """Infer what a story leaves unsaid, given what was seen.

    Parameters
    ----------
    story
        Name, or file.py:name.
    method
        auto, em, svi or nuts.
    want
        Points for the globals, or distributions over them too.
    save
        Keep the posterior in this file, for `zoo sample --given`.
    cross_check
        Run an independent second method on a small replica and say how far it ends from the first.
    """
    if method != "auto":
        check_methods([method])
    if save:
        check_writable(save)
    from inference import fit

    found = find_story(story, parse_settings(set_), example_settings=data is None)
    arguments = fill_arguments(found, data, columns, quiet)
    progress = False if quiet else None
    posterior = fit(
        found.story,
        arguments,
        method,
        guide=found.guide,
        want=want,
        seed=seed,
        progress=progress,
        cross_check=cross_check,
    )
    print(posterior.choice or posterior.why(), posterior.summary(), sep="\n\n")
    if save and leads():
        posterior.save(save)
        print(f"\nposterior: {save}")


@app.command
def compare(
    story: str,
    /,
    *,
    data: Data = None,
    columns: Columns = None,
    methods: str = "exact,em,svi,nuts",
    test: Annotated[float, Parameter(validator=Number(gt=0, lt=1))] = 0.2,
    set_: Settings = None,
    seed: Seed = 0,
    report: Path | None = None,
    cross_check: bool = False,
    quiet: Quiet = False,
) -> None:
    """Fit with several methods and hold them side by side on rows held out.

    Parameters
    ----------
    story
        Name, or file.py:name.
    methods
        Names separated by commas.
    test
        Share of the rows to hold out.
    report
        Write a report with figures into this HTML file.
    cross_check
        Hold every answer beside an independent method, however long that takes (else only where it takes seconds).
    """
    names = [name.strip() for name in methods.split(",") if name.strip()]
    check_methods(names)
    if report:
        check_writable(report, (".html",))
    from inference import compare

    found = find_story(story, parse_settings(set_), example_settings=data is None)
    arguments = fill_arguments(found, data, columns, quiet)
    progress = False if quiet else None
    comparison = compare(
        found.story, arguments, methods=names, test=test, guide=found.guide, seed=seed, progress=progress,
        cross_check=cross_check or "auto",
    )  # fmt: skip
    print(comparison)
    if report and leads():
        print(f"\nreport: {comparison.report(report)}")


@app.command
def calibrate(
    story: str,
    /,
    *,
    data: Data = None,
    columns: Columns = None,
    method: str = "auto",
    simulations: Annotated[int, Parameter(validator=Number(gte=1))] = 200,
    set_: Settings = None,
    seed: Seed = 0,
    plot: Path | None = None,
    quiet: Quiet = False,
) -> None:
    """Whether a method gives the right posterior of a story: answers to data whose truth is known.

    Exit code 1 where it does not.

    Parameters
    ----------
    story
        Name, or file.py:name.
    method
        auto, exact, nuts or svi; of svi also whether and which way it is biased.
    simulations
        Data sets of the given size to draw and answer.
    plot
        Draw the distributions of the ranks into this file (.png, .svg, .pdf).
    """
    if method != "auto":
        check_methods([method])
    if plot:
        check_writable(plot, (".png", ".svg", ".pdf"))
    from inference import check as calibrated

    found = find_story(story, parse_settings(set_), example_settings=data is None)
    arguments = fill_arguments(found, data, columns, quiet)
    progress = False if quiet else None
    answer = calibrated(found.story, arguments, method, simulations=simulations, seed=seed, progress=progress)
    print(answer)
    if plot:
        answer.plot().savefig(plot)
        print(f"\nranks: {plot}")
    if not answer.passed:
        raise SystemExit(FAULT)


@app.command
def sample(
    story: str,
    /,
    *,
    num_data: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    data: Data = None,
    given: Path | None = None,
    set_: Settings = None,
    seed: Seed = None,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
) -> None:
    """Dream up rows: from the story alone, or from a posterior that `zoo fit --save` kept.

    Parameters
    ----------
    story
        Name, or file.py:name.
    num_data
        Number of rows.
    data
        Covariates that the story needs and does not sample: a file, or a name from `zoo list`.
    given
        File of a posterior of this story.
    output
        CSV file; without it, rows go to standard output.
    """
    from .cli.tables import write_rows

    if output:
        check_writable(output, (".csv",))
    found = find_story(story, parse_settings(set_), example_settings=True)
    if given:
        rows = load_rows(found, given, num_data, seed)
    else:
        rows = dream_rows(found, num_data, data, seed)
    columns = write_rows(rows, output)
    if output:
        print(f"{len(next(iter(rows.values())))} rows of {', '.join(columns)}: {output}")


@app.command
def demo(*, out: Path = Path("demo-output"), seed: Seed = 0, quiet: Quiet = False) -> None:
    """The whole way on real data: three mixtures of Gaussians for the irises, by EM, SVI and NUTS.

    Parameters
    ----------
    out
        Folder for the plate diagram, the figure and the report.
    """
    from .cli.demo import run

    run(out, seed=seed, progress=False if quiet else None)


@app.meta.default
def _launch(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[bool, Parameter(help="Show where an error came from.")] = False,
) -> int:
    try:
        with first_rank_speaks(), terse_warnings(), counting_interrupts() as interrupts:
            app(words, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return USAGE  # cyclopts has said what is wrong
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # the terminal interrupts all ranks
            print("\nzoo: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as in `zoo sample ... | head`; the last flush must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        file = next(filter(None, map(file_of, words)), None)
        if _tells():
            print(f"zoo: {describe(error, file)}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", FAULT)
    return INTERRUPTED if interrupts else 0


def _tells() -> bool:
    """Whether this process is the one to tell of an error that several may have met."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from inference.distributed import tells_first

    return tells_first()


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `words` (default: the process's own).

    Returns
    -------
    The exit code: 0, 1 for an error in data or story, 2 for a wrong command, 130 for Ctrl-C.
    """
    try:
        words = sys.argv[1:] if words is None else words
        return app.meta(words, exit_on_error=False, result_action="return_value") or 0
    except CycloptsError:
        return USAGE


if __name__ == "__main__":
    sys.exit(main())

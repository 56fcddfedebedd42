"""The command `mpitrain report`."""

from __future__ import annotations

from pathlib import Path

import click

from mpitrain.bench.results import read_results
from mpitrain.collectives.table_file import store_text

__all__ = ["report"]


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RESULTS.json...")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    show_default=True,
    help="The page; everything is in this one file.",
)
@click.option("--png", is_flag=True, help="Write the plots as PNG files beside it, too.")
@click.option("--title", default="mpitrain benchmarks", show_default=True, help="Of the page.")
def report(results: tuple[Path, ...], output: Path, title: str, *, png: bool) -> None:
    """Make a page with plots of what mpitrain bench --json has written.

    Times, bandwidths and speed-ups by size; scaling, where several numbers of ranks were measured; training steps; and
    the model of mpitrain simulate beside the measurement. Needs no network, starts no MPI.
    """
    all_results = [read_results(path) for path in results]
    try:
        from mpitrain.bench.report import render_page, sections_of
    except ImportError as error:
        raise ValueError(f"report: a package is missing, got {error}; pip install mpitrain[report]") from None
    sections = sections_of(all_results)
    if not sections:
        raise ValueError("report: nothing was measured in these results; run mpitrain bench again")
    try:
        store_text(render_page(all_results, sections, title), output)
        click.echo(f"stored in {output}")
        for plot in (plot for section in sections for plot in section.plots if png):
            path = output.with_name(f"{output.stem}-{plot.name}.png")
            plot.save_png(path)
            click.echo(f"stored in {path}")
    except OSError as error:
        raise ValueError(f"report: cannot be stored, got {error}; name another file with --output") from None

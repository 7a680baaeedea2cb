"""`fracbit report`: the rows of a store as one page that opens offline."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from fracbit.cli import options
from fracbit.cli.show import print_json, print_said
from fracbit.errors import OutputError
from fracbit.records.extras import check_extra


def report(
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE",
            help="SQLite file, postgresql://USER@HOST/NAME, or Parquet of a sweep's --export: a file or a folder of them.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="HTML file to write.", rich_help_panel=options.WRITE)
    ] = Path("report.html"),
    title: Annotated[
        str, typer.Option(help="Heading of the page.", rich_help_panel=options.WRITE)
    ] = "Bits and loss",
    export: options.ExportRows = None,
    track: options.Track = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Write no file: show the page on this machine, made again as rows come, until Ctrl-C.",
            rich_help_panel=options.RUN,
        ),
    ] = False,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="With --watch: port; 0 takes a free one.", rich_help_panel=options.RUN
        ),
    ] = 8080,
    json: options.Json = False,
) -> None:
    """Write scaling curves, offsets, the Pareto front and all rows of STORE as one self-contained page."""
    from fracbit.report.page import write_page
    from fracbit.sweeps.exported import check_ending, export_rows, read_rows
    from fracbit.sweeps.trackers import tracking

    check_extra("a report", "plotly", "report", OutputError)
    if export is not None:
        check_ending(export)
    if watch:
        _watch(store, title, port)
        return
    with tracking(track) as add:
        rows = read_rows(store)
        write_page(rows, output, title)
        if export is not None:
            export_rows(rows, export)
        if add is not None:
            for row in rows:
                add(row)
    failed = sum(row.status == "failed" for row in rows)
    if json:
        print_json(
            {
                "output": str(output),
                "rows": len(rows) - failed,
                "failed": failed,
                "bytes": output.stat().st_size,
            }
        )
    else:
        print(f"{output}: {len(rows) - failed} rows" + (f", {failed} failed runs" if failed else ""))


def _watch(store: str, title: str, port: int) -> None:
    from fracbit.report.watch import watching
    from fracbit.sweeps.exported import read_rows

    read_rows(store)  # a store that is not there is said at once
    with watching(lambda: read_rows(store), title, port) as server:
        print_said(f"the page of {store} is at http://127.0.0.1:{server.server_port}/; Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            server.serve_forever()

"""`fracbit report`: the rows of a store as one page that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fracbit.cli import options
from fracbit.cli.show import print_json
from fracbit.errors import OutputError
from fracbit.records.files import is_store, named_path

if TYPE_CHECKING:
    from fracbit.records.row import Row


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
    json: options.Json = False,
) -> None:
    """Write scaling curves, offsets, the Pareto front and all rows of STORE as one self-contained page."""
    from fracbit.report.page import write_page
    from fracbit.sweeps.parquet import export_parquet

    rows = _rows(store)
    write_page(rows, output, title)
    if export is not None:
        export_parquet(rows, export)
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


def _rows(store: str) -> list[Row]:
    from fracbit.sweeps.parquet import import_parquet
    from fracbit.sweeps.store import open_store

    if not is_store(store):
        raise OutputError(f"no store {store}; `fracbit sweep SWEEP --store {store}` makes one")
    if store.endswith(".parquet") or named_path(store, OutputError).is_dir():
        return import_parquet(Path(store))
    with open_store(store) as opened:
        return opened.rows()

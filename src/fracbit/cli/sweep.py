"""`fracbit sweep`: many runs into one store, here or on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fracbit.cli import options
from fracbit.cli.show import bytes_text, print_json
from fracbit.cli.stopped import keeping_rows
from fracbit.errors import OutputError, RecipeError
from fracbit.records.extras import check_extra

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fracbit.records.row import Row
    from fracbit.sweeps.estimate import Estimate
    from fracbit.sweeps.runner import Engine

RAY = "On Ray"


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="Sweep file (TOML); see docs/guide.md.")],
    store: Annotated[
        str,
        typer.Option(help="SQLite file, or postgresql://USER@HOST/NAME.", rich_help_panel=options.WRITE),
    ] = "sweep.db",
    export: options.ExportRows = None,
    track: options.Track = None,
    imported: Annotated[
        Path | None,
        typer.Option(
            "--import",
            help="First import the rows of a Parquet file that --export wrote.",
            rich_help_panel=options.WRITE,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only print runs, time and disk; may measure one run to estimate the time.",
            rich_help_panel=options.MEASURE,
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Try failed runs again.", rich_help_panel=options.MEASURE),
    ] = False,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going",
            help="Go on after a bug of fracbit: the run becomes a failed row with the traceback.",
            rich_help_panel=options.MEASURE,
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ...; without --ray.", rich_help_panel=options.RUN)
    ] = "cpu",
    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help="Run on Ray, started here unless --address is given.", rich_help_panel=RAY
        ),
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster: HOST:6379, ray://HOST:10001 or auto.", rich_help_panel=RAY),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Ray workers; default as many as fit.", rich_help_panel=RAY)
    ] = None,
    cpus: Annotated[float, typer.Option(help="CPUs of a Ray worker.", rich_help_panel=RAY)] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs of a Ray worker.", rich_help_panel=RAY)] = 0,
    memory: Annotated[
        float | None, typer.Option(help="Memory of a Ray worker in GB.", rich_help_panel=RAY)
    ] = None,
    retries: Annotated[
        int,
        typer.Option(help="How often a run is tried again after its worker died.", rich_help_panel=RAY),
    ] = 2,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure every run of SWEEP that the store lacks. You can stop it at any time; start it again to continue.

    Exit code 1 when a run failed: its row says why, and the other rows are stored.
    """
    if address is not None:
        from fracbit.sweeps.address import check_address

        check_address(address)  # before anything slow is imported
    if ray or address is not None:
        _check_ray(device, workers, min(cpus, gpus, retries))
        check_extra("--ray", "ray", "ray", OutputError)
    from fracbit.sweeps.exported import check_ending, export_rows
    from fracbit.sweeps.parquet import import_parquet
    from fracbit.sweeps.spec import expand, read_sweep
    from fracbit.sweeps.store import open_store, shown
    from fracbit.sweeps.trackers import check_tracker

    if export is not None:
        check_ending(export)
    if track is not None:
        check_tracker(track)
    read = read_sweep(file).model_copy(update={"trust_remote_code": trust_remote_code})
    root = (file.parent / read.root).resolve()
    known = [] if imported is None else import_parquet(imported)
    if dry_run:
        from fracbit.sweeps.estimate import estimate_sweep

        _print_estimate(estimate_sweep(expand(read), store, root, device=device, known=known), json)
        return
    from fracbit.sweeps.runner import check_complete
    from fracbit.sweeps.runner import sweep as measure

    engine = None
    if ray or address is not None:
        engine = _on_ray(
            root,
            address,
            device=device,
            workers=workers,
            cpus=cpus,
            gpus=gpus,
            memory=memory,
            retries=retries,
            keep_going=keep_going,
        )
    with keeping_rows(shown(store)):
        outcome = measure(
            read,
            store,
            root=root,
            engine=engine,
            device=device,
            retry_failed=retry_failed,
            keep_going=keep_going and engine is None,
            known=known,
            track=track,
            progress=None if json or quiet else _show,
        )
    if export is not None:
        with open_store(store) as opened:
            export_rows(opened.rows(), export)
    failed = [{"key": row.key, "label": str(row.run), "error": row.error} for row in outcome.failed]
    if json:
        figures = {
            "runs": outcome.total,
            "measured": outcome.measured,
            "failed": failed,
            "skipped": dict(outcome.skipped),
            "seconds": outcome.seconds,
        }
        print_json({"store": shown(store), **figures})
    else:
        print(
            f"{outcome.measured} rows written in {outcome.seconds:.0f} s; "
            f"all {outcome.total} runs of the sweep are in {shown(store)}"
        )
        _print_skipped(outcome.skipped)
        print(check_complete(outcome), end="\n" if failed else "")
    if failed:
        raise typer.Exit(1)


def _on_ray(
    root: Path,
    address: str | None,
    device: str,
    workers: int | None,
    cpus: float,
    gpus: float,
    memory: float | None,
    retries: int,
    keep_going: bool,
) -> Engine:
    from fracbit.sweeps.ray_engine import OnRay

    size = None if memory is None else int(memory * 1e9)
    return OnRay(
        root,
        address,
        workers=workers,
        cpus=cpus,
        gpus=gpus,
        memory=size,
        retries=retries,
        keep_going=keep_going,
    )


def _check_ray(device: str, workers: int | None, least: float) -> None:
    """Refuse numbers that Ray cannot have, of which `least` is the smallest, and a device beside it. Raises `RecipeError`."""
    if (workers is not None and workers < 1) or least < 0:
        raise RecipeError("--workers must be at least 1, and --cpus, --gpus and --retries not below 0")
    if device != "cpu":
        raise RecipeError(
            f"--device {device} is for a sweep without Ray: --gpus 1 gives each worker of Ray a GPU"
        )


def _show(row: Row, done: int, total: int) -> None:
    if row.status == "failed":
        figures = f"failed: {row.error}"
    else:
        bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f} bits per weight, "
        loss = (
            f"perplexity {row.perplexity:.4g}"
            if row.perplexity is not None
            else f"{row.nll:.1f} nats per token"
        )
        figures = f"{bits}{loss}, {row.seconds:.1f} s"
    print(f"{done}/{total} {row.run}: {figures}", flush=True)


def _print_estimate(found: Estimate, json: bool) -> None:
    if json:
        models = [vars(model) for model in found.models]
        print_json(
            {
                "runs": found.runs,
                "done": found.done,
                "seconds": found.seconds,
                "disk_bytes": found.disk_bytes,
                "skipped": dict(found.skipped),
                "models": models,
            }
        )
        return
    print(f"{found.runs} runs, {found.done} of them done")
    for model in found.models:
        time = "time unknown" if model.seconds is None else _duration(model.seconds)
        print(f"  {model.model}: {model.runs - model.done} left, {time} ({model.basis})")
    _print_skipped(found.skipped)
    total = "unknown" if found.seconds is None else _duration(found.seconds)
    print(f"time left on one worker: {total}; disk: {bytes_text(found.disk_bytes)}")


def _print_skipped(skipped: Mapping[str, int]) -> None:
    for reason, count in skipped.items():
        print(f"  {count} {'point' if count == 1 else 'points'} left out: {reason}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

"""Rows as runs of an experiment tracker, by its own client: MLflow, Weights & Biases. A tracker is an entry of `TRACKERS`.

Each row is one run: the recipe as parameters, figures as metrics. A row that the tracker has already is not added again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from fracbit.errors import OutputError
from fracbit.records.extras import check_extra
from fracbit.records.row import Row, label, settings
from fracbit.records.tables import TRACKERS

Track = Callable[[Row], None]
"""Add a row."""
Tracker = Callable[[str], AbstractContextManager[Track]]
"""Open an experiment by its name, "" for the tracker's default one."""
CLIENTS = {"mlflow": "mlflow", "wandb": "wandb"}
"""The package of each tracker here, which is also the extra that installs it."""


def tracking(word: str | None) -> AbstractContextManager[Track | None]:
    """What `--track` names, `mlflow:EXPERIMENT` or `wandb:PROJECT`, open; None for none. Raises as `check_tracker`."""
    if word is None:
        return nullcontext()
    check_tracker(word)
    name, _, experiment = word.partition(":")
    opened: AbstractContextManager[Track] = TRACKERS[name](experiment)
    return opened


def check_tracker(word: str) -> None:
    """Raises `RecipeError` for an unknown tracker, `OutputError` where its client is not installed."""
    name = TRACKERS.check(word.partition(":")[0])
    if name in CLIENTS:
        check_extra(f"--track {name}", CLIENTS[name], name, OutputError)


def parameters_of(row: Row) -> dict[str, str]:
    """What was done, as text: model, scheme, text and every setting that differs from its default."""
    recipe = row.run.recipe
    scheme = str(recipe.scheme) if row.run.quantized else "float"
    others = {name: str(value) for name, value in settings(recipe).items() if name != "overrides"}
    return {
        "key": row.key,
        "model": recipe.model,
        "scheme": scheme,
        "text": row.run.evaluation.text,
        **others,
    }


def figures_of(row: Row) -> dict[str, float]:
    """What came out, those figures that the row has."""
    names = ("nll", "perplexity", "divergence", "agreement", "bits_per_weight", "bits_per_parameter", "model_bits",
             "weight_error", "seconds")  # fmt: skip
    found = {name: getattr(row, name) for name in names} | {
        f"accuracy/{task}": share for task, share in row.accuracies.items()
    }
    return {name: float(value) for name, value in found.items() if value is not None}


@contextmanager
def mlflow(experiment: str) -> Iterator[Track]:
    """Runs of MLflow, at the place that MLFLOW_TRACKING_URI names. Raises `OutputError` where its client does."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client, name = MlflowClient(), experiment or "fracbit"
    try:
        found = client.get_experiment_by_name(name)
        place: str = client.create_experiment(name) if found is None else found.experiment_id
    except (MlflowException, ImportError) as error:  # a place in a local database asks for more packages
        raise OutputError(f"MLflow cannot open the experiment {name!r}: {error}") from error

    def track(row: Row) -> None:
        try:
            if client.search_runs([place], f"tags.fracbit_key = '{row.key}'", max_results=1):
                return
            run = client.create_run(place, run_name=label(row.run), tags={"fracbit_key": row.key})
            for parameter, text in parameters_of(row).items():
                client.log_param(run.info.run_id, parameter, text)
            for figure, value in figures_of(row).items():
                client.log_metric(run.info.run_id, figure, value)
            client.set_terminated(run.info.run_id, "FAILED" if row.status == "failed" else "FINISHED")
        except MlflowException as error:
            raise OutputError(f"MLflow does not take row {row.key}: {error}") from error

    yield track


@contextmanager
def wandb(project: str) -> Iterator[Track]:
    """Runs of Weights & Biases, as WANDB_MODE and its other variables say. Raises `OutputError` where its client does."""
    import wandb as client

    def track(row: Row) -> None:
        plan: dict[str, Any] = {
            "project": project or "fracbit",
            "id": row.key,
            "name": label(row.run),
            "resume": "allow",
        }
        try:
            with client.init(config=parameters_of(row), reinit="finish_previous", **plan) as run:
                run.summary.update(figures_of(row) | ({"error": row.error} if row.error else {}))
        except client.errors.Error as error:
            raise OutputError(f"Weights & Biases does not take row {row.key}: {error}") from error

    yield track

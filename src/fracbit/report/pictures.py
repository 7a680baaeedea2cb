"""Pictures of plans and lenses as PNG, SVG or PDF files, each with its data beside it as CSV. matplotlib is the extra `plots`.

They are drawn from numbers and records; the pipeline measures. Figures are objects, made without pyplot, so there is no
window and no global state.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fracbit.errors import OutputError, RecipeError
from fracbit.records.extras import check_extra
from fracbit.records.lens import EVERYWHERE, LensPoint, LensReport, fragility
from fracbit.records.scheme import Scheme

# Distinct in grey and to colour-blind eyes (Okabe & Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKS = "osD^vPX*"
DPI = 110
FORMATS = (".png", ".svg", ".pdf")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows of equal keys as CSV. Raises `OutputError` when the file cannot be written."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def draw_bits(
    path: Path, schemes: Mapping[str, Scheme | None], bits: Mapping[str, float], blocks: str
) -> None:
    """Heat map of stored bits per weight, blocks down and modules across.

    `bits`: stored bits per weight of every layer in `schemes`; `blocks`: the path of the list of blocks.
    """
    rows = []
    for name, scheme in schemes.items():
        number, _, module = name.removeprefix(f"{blocks}.").partition(".")
        rows.append(
            {
                "block": int(number),
                "module": module,
                "scheme": str(scheme or "float"),
                "bits_per_weight": bits[name],
            }
        )
    write_csv(path.with_suffix(".csv"), rows)
    table = [(str(row["block"]), str(row["module"]), float(str(row["bits_per_weight"]))) for row in rows]
    heat_map(path, table, "stored bits per weight", "block", text="{:.2f}", span=1.0)


def heat_map(
    path: Path,
    cells: Sequence[tuple[str, str, float]],
    what: str,
    down: str,
    text: str = "{:.3g}",
    span: float = 1e-9,
) -> None:
    """Cells (row, column, value) as a heat map with the values written in; missing cells stay white.

    The colours cover at least `span`, so that a hundredth of a bit does not look like a large difference.
    """
    figure_class, colours = _matplotlib()
    rows, columns = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    grid = [[math.nan] * len(columns) for _ in rows]
    for row, column, value in cells:
        grid[rows.index(row)][columns.index(column)] = value
    figure = figure_class(
        figsize=(2.2 + 0.75 * len(columns), max(3.2, 1.6 + 0.3 * len(rows))), layout="constrained"
    )
    axes = figure.add_subplot()
    finite = [value for _, _, value in cells if math.isfinite(value)]
    norm = colours.Normalize(min(finite), max(max(finite), min(finite) + span))
    picture = axes.imshow(grid, aspect="auto", cmap="viridis", norm=norm)
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if math.isfinite(value):
                shade = "white" if norm(value) < 0.55 else "black"
                axes.text(x, y, text.format(value), ha="center", va="center", color=shade, fontsize=7)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylabel(down)
    figure.colorbar(picture, label=what)
    _save(figure, path)


def draw_plan(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], chosen: tuple[float, float], loss: str
) -> None:
    """Predicted loss against stored bits per weight for each solver; the uniform schemes are points, the chosen one a ring."""
    rows = [
        {"solver": name, "bits_per_weight": x, "predicted_loss": y}
        for name, line in curves.items()
        for x, y in line
    ]
    write_csv(path.with_suffix(".csv"), rows)
    figure_class, _ = _matplotlib()
    figure = figure_class(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, line) in enumerate(curves.items()):
        xs, ys = [x for x, _ in line], [y for _, y in line]
        style = "none" if name == "uniform" else "-"
        axes.plot(xs, ys, MARKS[index], linestyle=style, color=COLOURS[index], label=name, markersize=4)
    axes.plot(
        [chosen[0]], [chosen[1]], "o", markersize=12, markerfacecolor="none", color="black", label="chosen"
    )
    if all(y > 0 for line in curves.values() for _, y in line):
        axes.set_yscale("log")
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel(f"predicted loss ({loss})")
    _finish(axes)
    _one_legend(figure)
    _save(figure, path)


def draw_lens(report: LensReport, folder: Path, noise: Collection[str]) -> None:
    """Pictures of a lens report, PNG with CSV beside them, in a folder that is made if it does not exist.

    `noise`: the kinds of error that were drawn at chosen intensities. Raises `OutputError`, `RecipeError`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}") from error
    check_picture(folder / "intensity.png")
    draw_intensity(folder / "intensity.png", report.curves, noise)
    write_csv(folder / "effects.csv", [point.row() for point in report.effects])
    cells = [
        (point.layers, f"{point.target} {point.kind}", point.change)
        for point in report.effects
        if point.layers != EVERYWHERE
    ]
    heat_map(folder / "effects.png", cells, "loss change, nats per token", "unit")
    write_csv(folder / "fragility.csv", fragility(report.effects))
    draw_lines(
        folder / "profile.png",
        report.profiles,
        across="|w| / rms",
        up="error / rms",
        log=(True, True),
        title="rounding error against |w|",
    )


def draw_intensity(path: Path, points: Sequence[LensPoint], noise: Collection[str]) -> None:
    """Loss change against relative intensity, a panel for each target: a line with its 95 % band for each kind of `noise`.

    Schemes and clipping have a fixed intensity and are black marks; noise of equal strength is a hollow mark.
    """
    write_csv(path.with_suffix(".csv"), [point.row() for point in points])
    figure_class, _ = _matplotlib()
    targets = list(dict.fromkeys(point.target for point in points))
    figure = figure_class(figsize=(3.2 + 4.2 * len(targets), 4.2), layout="constrained")
    for column, target in enumerate(targets):
        axes = figure.add_subplot(1, len(targets), column + 1)
        here = [point for point in points if point.target == target]
        _draw_noise(axes, [point for point in here if point.kind in noise])
        _draw_single(axes, [point for point in here if point.kind not in noise])
        _intensity_axes(axes, here, [point for point in here if point.kind in noise] or here)
        axes.set_title(f"errors in {target}", fontsize=10)
        _finish(axes)
    _one_legend(figure)
    _save(figure, path)


def _intensity_axes(axes: Any, points: Sequence[LensPoint], marked: Sequence[LensPoint]) -> None:
    """Scales and labels; the intensities of the points `marked` have ticks."""
    axes.set_xscale("log")
    ticks = sorted({float(f"{point.intensity:.2g}") for point in marked})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    if all(point.change > 0 for point in points):
        axes.set_yscale("log", nonpositive="clip")
    else:
        # A small error may lower the loss by chance, and a plain logarithm would hide that.
        axes.set_yscale("symlog", linthresh=0.01)
    axes.set_xlabel("relative intensity |delta| / |x|")
    axes.set_ylabel("loss change, nats per token")


def _draw_noise(axes: Any, points: Sequence[LensPoint]) -> None:
    """A line and its band for each kind."""
    for index, kind in enumerate(dict.fromkeys(point.kind for point in points)):
        line = sorted((p for p in points if p.kind == kind), key=lambda p: p.intensity)
        xs, colour = [p.intensity for p in line], COLOURS[index % len(COLOURS)]
        mark = MARKS[index % len(MARKS)]
        axes.plot(
            xs, [p.change for p in line], mark, linestyle="-", color=colour, markersize=4, label=kind, linewidth=1.2
        )  # fmt: skip
        low, high = [p.low for p in line], [p.high for p in line]
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_single(axes: Any, points: Sequence[LensPoint]) -> None:
    """A mark for each point; noise of equal strength has the same mark, hollow."""
    bare = list(dict.fromkeys(point.kind.removesuffix(" as gaussian") for point in points))
    for point in points:
        mark = MARKS[bare.index(point.kind.removesuffix(" as gaussian")) % len(MARKS)]
        face = "white" if point.kind.endswith(" as gaussian") else "black"
        axes.plot(
            [point.intensity], [point.change], mark, color="black", markerfacecolor=face, markersize=7, label=point.kind
        )  # fmt: skip


def draw_lines(
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    across: str,
    up: str,
    log: tuple[bool, bool] = (False, False),
    title: str = "",
) -> None:
    """Named lines of (x, y) with a marker at each point; their data goes into a CSV file beside the picture."""
    draw_panels(path, {title: lines}, across, up, log=log)


def draw_panels(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    across: str,
    up: str,
    log: tuple[bool, bool] = (False, False),
) -> None:
    """Panels side by side, title -> named lines of (x, y), with their data as CSV; a name has one colour in all panels.

    Marks shrink from name to name, so that lines on top of each other are all seen.
    """
    named = [name for lines in panels.values() for name in lines]
    style = {name: index for index, name in enumerate(dict.fromkeys(named))}
    rows = [
        ({"panel": title} if len(panels) > 1 else {}) | {"line": name, across: x, up: y}
        for title, lines in panels.items()
        for name, line in lines.items()
        for x, y in line
    ]
    write_csv(path.with_suffix(".csv"), rows)
    figure_class, _ = _matplotlib()
    figure = figure_class(figsize=(3.0 + 4.2 * len(panels), 4.2), layout="constrained")
    for column, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), column + 1)
        for name, line in lines.items():
            axes.plot(
                [x for x, _ in line], [y for _, y in line], color=COLOURS[style[name] % len(COLOURS)],
                marker=MARKS[style[name] % len(MARKS)], linestyle="-" if style[name] < len(COLOURS) else ":",
                markersize=max(3.0, 3.0 + 0.8 * (len(style) - 1 - style[name])), linewidth=1.2, label=name,
            )  # fmt: skip
        axes.set_xscale("log" if log[0] else "linear")
        axes.set_yscale("log" if log[1] else "linear")
        axes.set_xlabel(across)
        axes.set_ylabel(up if column == 0 else "")
        axes.set_title(title, fontsize=10)
        _finish(axes)
    _one_legend(figure)
    _save(figure, path)


def check_picture(path: Path) -> None:
    """Refuse, before any work, a picture that could not be drawn. Raises `RecipeError`, `OutputError`."""
    _matplotlib()
    if path.suffix.lower() not in FORMATS:
        raise RecipeError(f"{path} is not a picture; its name must end in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder; make it first")


def _matplotlib() -> tuple[Any, Any]:
    check_extra("a picture", "matplotlib", "plots")
    from matplotlib import colors
    from matplotlib.figure import Figure

    return Figure, colors


def _one_legend(figure: Any) -> None:
    """One legend with the names of all panels, beside them."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    named = {label: mark for marks, labels in found for mark, label in zip(marks, labels, strict=True)}
    figure.legend(named.values(), named, loc="outside right upper", fontsize=8, frameon=False)


def _finish(axes: Any) -> None:
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log" and axis.get_minor_formatter() is not None:
            _plain_ticks(axis)


def _plain_ticks(axis: Any) -> None:
    """Ticks at 1, 2 and 5 as plain numbers: 0.02 instead of a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error

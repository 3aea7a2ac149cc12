"""What was measured, as figures, as a table, as CSV with timm's column names, and as an image."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ulsam.base.plot_style import style
from ulsam.base.text_table import as_csv, text_table
from ulsam.deploy.bench_worker import BenchBackend
from ulsam.surgery.cost import Cost
from ulsam.training.summary import cost_entry

HEADS = (
    "model",
    "backend",
    "batch",
    "threads",
    "ms",
    "p95",
    "images/s",
    "to the first",
    "peak MB",
    "model MB",
    "turns",
)
COLUMNS = (
    "model",
    "infer_img_size",
    "infer_batch_size",
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_gmacs",
    "infer_macts",
    "param_count",
    "backend",
    "threads",
    "infer_step_time_p95",
    "infer_step_time_ratio",
    "infer_step_time_ratio_low",
    "infer_step_time_ratio_high",
    "peak_memory_mb",
    "model_size_mb",
    "turns",
)
"""Of the CSV. The first eight are those of timm's benchmark.py and its tables: milliseconds a batch, billions of MACs,
millions of activations and of parameters."""


@dataclass(frozen=True)
class BenchRow:
    """One model in one backend, for one batch size and number of threads.

    Attributes:
        image_size: width of the images, in pixels.
        seconds, seconds_p95: of a batch, median and 95th percentile over the turns.
        ratio: of the median to that of the first model in the same backend; None where that one was not measured.
        ratio_interval: 95 %, over the choice of turns; None for the first model, and where turns are too few.
        peak_memory: largest resident set of a process that loads this model alone and runs it, in bytes; None where the
            system does not say.
        model_size: bytes of the file, or of parameters and buffers in PyTorch.
        cost: parameters, MACs and activations; None where no spec says.
    """

    model: str
    backend: BenchBackend
    batch: int
    threads: int
    image_size: int
    seconds: float
    seconds_p95: float
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    peak_memory: int | None
    model_size: int
    cost: Cost | None
    turns: int

    @property
    def per_second(self) -> float:
        """Images a second, at the median."""
        return self.batch / self.seconds


def text(rows: Sequence[BenchRow]) -> str:
    """For the terminal."""
    lines = text_table([list(HEADS), *map(_cells, rows)], right=range(2, len(HEADS)))
    return "\n".join([*lines, "", LEGEND])


LEGEND = """\
ms: of a batch from RGB bytes to logits, median and 95th percentile over the turns. To the first: ratio of the median
to that of the first model in the same backend, with its 95 % interval over the turns of this run. Peak: largest
resident set of a process that loads and runs this model alone, interpreter, libraries and compilation included.
Model: the file that was run, or parameters and buffers in PyTorch. MB: a million bytes."""


def csv_text(rows: Sequence[BenchRow]) -> str:
    """As CSV, a line a row, with the columns `COLUMNS`; a cell is empty where there is nothing to say."""
    lines: list[list[object]] = [list(COLUMNS)]
    for row in rows:
        low, high = row.ratio_interval or (None, None)
        values: dict[str, Any] = {
            "model": row.model,
            "infer_img_size": row.image_size,
            "infer_batch_size": row.batch,
            "infer_samples_per_sec": row.per_second,
            "infer_step_time": 1e3 * row.seconds,
            "infer_gmacs": row.cost and row.cost.macs / 1e9,
            "infer_macts": row.cost and row.cost.activations / 1e6,
            "param_count": row.cost and row.cost.params / 1e6,
            "backend": row.backend,
            "threads": row.threads,
            "infer_step_time_p95": 1e3 * row.seconds_p95,
            "infer_step_time_ratio": row.ratio,
            "infer_step_time_ratio_low": low,
            "infer_step_time_ratio_high": high,
            "peak_memory_mb": row.peak_memory and row.peak_memory / 1e6,
            "model_size_mb": row.model_size / 1e6,
            "turns": row.turns,
        }
        lines.append([f"{value:.6g}" if isinstance(value := values[name], float) else value for name in COLUMNS])
    return as_csv(lines)


def draw(rows: Sequence[BenchRow]) -> bytes:
    """A PNG: milliseconds a batch in each backend, a panel for each batch size and number of threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches, threads = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("batch", "threads"))
    models, backends = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("model", "backend"))
    size = (1.5 + max(2.0, 0.9 * len(backends)) * len(threads), 1.2 + 2.6 * len(batches))
    figure = Figure(figsize=(max(size[0], 6.5), size[1]), layout="constrained")
    panels = figure.subplots(len(batches), len(threads), squeeze=False, sharey="row")
    step = 0.6 / len(models)
    for line, batch in zip(panels, batches, strict=True):
        for panel, number in zip(line, threads, strict=True):
            for place, model in enumerate(models):
                shown = [row for row in rows if (row.model, row.batch, row.threads) == (model, batch, number)]
                middles = [1e3 * row.seconds for row in shown]
                upwards = [1e3 * (row.seconds_p95 - row.seconds) for row in shown]
                x = [backends.index(row.backend) + (place - (len(models) - 1) / 2) * step for row in shown]
                bar: Any = [[0.0] * len(shown), upwards]
                panel.errorbar(x, middles, yerr=bar, capsize=4, label=model, **style(place))
            panel.set(xlim=(-0.5, len(backends) - 0.5), title=f"batch {batch}, {threads_text(number)}")
            panel.set_xticks(range(len(backends)), backends)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set(ylabel="ms a batch")
        line[0].set_ylim(bottom=0)
    figure.suptitle("markers: the median over the turns; bars up to the 95th percentile", fontsize=8)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def to_json(row: BenchRow) -> dict[str, Any]:
    """A row as JSON: seconds, bytes and plain counts."""
    return {**vars(row), "cost": row.cost and cost_entry(row.cost), "per_second": row.per_second}


def _cells(row: BenchRow) -> list[str]:
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    if row.ratio_interval:
        low, high = row.ratio_interval
        ratio += f" [{low:.3f}, {high:.3f}]"
    return [
        row.model,
        row.backend,
        str(row.batch),
        str(row.threads),
        *(f"{1e3 * seconds:.{_decimals(1e3 * seconds)}f}" for seconds in (row.seconds, row.seconds_p95)),
        f"{row.per_second:.{_decimals(row.per_second)}f}",
        ratio,
        "" if row.peak_memory is None else f"{row.peak_memory / 1e6:.0f}",
        f"{row.model_size / 1e6:.2f}",
        str(row.turns),
    ]


def _decimals(value: float) -> int:
    """As many as make three digits."""
    return max(0, 2 - math.floor(math.log10(value)))


def threads_text(number: int) -> str:
    """A number of threads in words.

    >>> threads_text(1), threads_text(2)
    ('1 thread', '2 threads')
    """
    return "1 thread" if number == 1 else f"{number} threads"

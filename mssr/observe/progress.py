"""What a run shows: what it is doing before and between the steps, and a live display of the steps.

In a terminal a bar, then a panel; in a log plain lines, at most one every few seconds.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Column as TableColumn
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 5.0
PANEL_WIDTH = 92
SPARK_WIDTH = 32
PACE_WINDOW = 50  # steps that predict the time left; enough to include validations and checkpoints
SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Column:
    """One shown metric.

    format: of the value, for `format()`; the unit follows it.
    trend: the panel shows it in its own row with a sparkline.
    validation: rarely measured: the best value so far is shown, and each new value prints a plain line.
    """

    key: str
    label: str = ""
    format: str = ".2f"
    unit: str = ""
    trend: bool = False
    validation: bool = False

    def show(self, value: float | None) -> str:
        return "-" if value is None else format(value, self.format)


_VALIDATION = Column("val/accuracy", "val", trend=True, validation=True)
_PACE = (
    Column("perf/tokens_per_second", format=".0f", unit="tok/s"),
    Column("perf/step_seconds", format=".3g", unit="s/step"),
)
RL_COLUMNS = (
    Column("train/reward", "reward", trend=True),
    _VALIDATION,
    Column("policy/entropy", "entropy", ".3f"),
    Column("policy/clip_fraction", "clip", ".3f"),
    Column("rollout/logp_gap_mean", "gap", ".1e"),
    *_PACE,
)
SFT_COLUMNS = (Column("sft/loss", "loss", ".3f", trend=True), _VALIDATION, *_PACE)


class TrainProgress:
    """Shows a run's progress: `with TrainProgress("demo", 200) as progress: ... progress.update(step, values)`.

    doing: what runs besides the steps (a validation), shown in the panel; "" for nothing.
    start_step: steps of earlier sessions (resumed run), which the time left does not count.
    enabled: False shows nothing (all ranks but the first).
    columns: metrics to show; "-" until the first value.
    console, clock: output, and monotonic seconds.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        *,
        columns: tuple[Column, ...] = RL_COLUMNS,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._total = total_steps
        self._step = start_step
        self._enabled = enabled
        self._columns = columns
        self._console = console or _stdout_console()
        self._clock = clock
        self._history: dict[str, list[float]] = {column.key: [] for column in columns}
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_WINDOW + 1)
        self._last_line = -math.inf
        self._live: Live | None = None
        self.doing = ""

    def __enter__(self) -> "TrainProgress":
        self._started = self._clock()
        self._pace.append((self._started, self._step))
        if self._enabled and self._console.is_interactive:
            self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_exception) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show metrics of a finished step; other keys are ignored, missing keys keep their last value."""
        if not self._enabled:
            return
        now = self._clock()
        if step != self._step:
            self._step = step
            self._pace.append((now, step))
        for column in self._columns:
            if column.key in values:
                self._history[column.key].append(float(values[column.key]))
        if self._live is None:
            validated = any(column.validation and column.key in values for column in self._columns)
            if validated or step >= self._total or now - self._last_line >= LINE_EVERY_S:
                self._last_line = now
                self.note(self._line())

    def note(self, text: str) -> None:
        """Print a line above the display."""
        if self._enabled:
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _line(self) -> str:
        width = len(str(self._total))
        parts = [f"step {self._step:>{width}}/{self._total}", *(self._cell(column) for column in self._columns)]
        return "  ".join([*parts, f"left {self._left()}"])

    def _cell(self, column: Column) -> str:
        """`reward 0.61`, `val 0.58 (best 0.60)`, `5200 tok/s`."""
        best = self._best(column)
        parts = (column.label, column.show(self._last(column)), column.unit, best and f"(best {best})")
        return " ".join(part for part in parts if part)

    def _panel(self) -> RenderableType:
        """Build the panel. Runs in the live display's thread, too, possibly during `update`, so it only reads."""
        bar = Table.grid("", TableColumn(ratio=1), "", "", padding=(0, 2), expand=True)
        bar.add_row(
            Text.assemble("step ", (f"{self._step}", "bold"), f"/{self._total}"),
            ProgressBar(total=self._total, completed=self._step),
            Text(f"{_duration(self._clock() - self._started)} gone", "dim"),
            Text(f"{self._left()} left"),
        )
        trends = Table.grid(padding=(0, 2))
        for column in self._columns:
            if column.trend:
                best = self._best(column)
                trends.add_row(
                    Text(column.label, "dim"),
                    Text(column.show(self._last(column)), "bold"),
                    Text(_sparkline(self._history[column.key][-SPARK_WIDTH:]), "cyan"),
                    Text(f"best {best}" if best else "", "green"),
                )
        rest = Text("   ".join(self._cell(column) for column in self._columns if not column.trend))
        doing = [Text(self.doing, "dim", no_wrap=True, overflow="ellipsis")] if self.doing else []
        width = min(self._console.width, PANEL_WIDTH)
        return Panel(
            Group(bar, trends, rest, *doing), title=self._title, title_align="left", border_style="dim", width=width
        )

    def _last(self, column: Column) -> float | None:
        history = self._history[column.key]
        return history[-1] if history else None

    def _best(self, column: Column) -> str:
        finite = [value for value in self._history[column.key] if math.isfinite(value)]
        return column.show(max(finite)) if column.validation and finite else ""

    def _left(self) -> str:
        """Return the time left at the pace of the last steps; "-" before the first one."""
        (first_time, first_step), (last_time, last_step) = self._pace[0], self._pace[-1]
        if last_step == first_step:
            return "-"
        finish = last_time + (last_time - first_time) / (last_step - first_step) * (self._total - last_step)
        return _duration(max(0.0, finish - self._clock()))


Advance = Callable[[int, int], None]  # called with how many are done since the last call, and how many there are in all


class Activity:
    """Says what a run does besides its steps: loading, checking, validating.

        with activity("validation") as advance:
            ...
            advance(1, 512)

    The beginning is a plain line. While it counts, a terminal shows a bar below, and a log gets a line every few seconds.
    Nothing is live before the first count: libraries that start up write to the terminal themselves.
    """

    def __init__(
        self, enabled: bool = True, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._enabled = enabled
        self._console = console or _stdout_console()
        self._clock = clock
        self._display: TrainProgress | None = None

    def say(self, text: str) -> None:
        if self._enabled:
            self._console.print(f"mssr: {text}", soft_wrap=True, markup=False, highlight=False)

    @contextmanager
    def within(self, display: TrainProgress) -> Iterator[None]:
        """Context in which the steps are shown: activities are part of the display, and their beginnings are no lines."""
        self._display = display
        try:
            yield
        finally:
            self._display = None

    @contextmanager
    def __call__(self, what: str) -> Iterator[Advance]:
        if not self._enabled:
            yield lambda by, total: None
            return
        if self._display is None:
            self.say(what)
        with ExitStack() as opened:
            if not self._console.is_interactive:
                show = self._in_lines(what)
            elif self._display is None:
                show = self._in_a_bar(opened)
            else:
                show = self._in_the_panel(self._display, what, opened)
            done = 0

            def advance(by: int, total: int) -> None:
                nonlocal done
                done = min(done + by, total)
                show(done, total)

            yield advance

    def _in_lines(self, what: str) -> Callable[[int, int], None]:
        last = started = self._clock()

        def show(done: int, total: int) -> None:
            nonlocal last
            now = self._clock()
            if now - last >= LINE_EVERY_S and done:
                last = now
                left = _duration((now - started) / done * (total - done))
                self.say(f"{what}: {done}/{total}, {left} left")

        return show

    def _in_a_bar(self, opened: ExitStack) -> Callable[[int, int], None]:
        columns = (TextColumn("     "), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("left"))
        bar = Progress(*columns, console=self._console, transient=True)
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not bar.live.is_started:
                opened.enter_context(bar)

        return show

    def _in_the_panel(self, display: TrainProgress, what: str, opened: ExitStack) -> Callable[[int, int], None]:
        opened.callback(setattr, display, "doing", "")
        display.doing = what
        return lambda done, total: setattr(display, "doing", f"{what} {done}/{total}")


def _stdout_console() -> Console:
    # FORCE_COLOR, set in many CI systems, makes rich treat a pipe as a terminal; a log file must not get the panel.
    return Console(force_interactive=None if sys.stdout.isatty() else False)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _sparkline(values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)

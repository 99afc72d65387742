"""One live line with step, rate, time left and the metrics; plain lines when the output is no terminal."""

import sys
import time
from collections.abc import Mapping

PLAIN_SECONDS = 10.0  # between two plain lines


class Progress:
    """Progress of one phase after the other, on standard error."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self._live = None
        self._label, self._total, self._done, self._begun = "", 0, 0, 0.0
        self._metrics = ""
        self._last = 0.0
        if enabled and sys.stderr.isatty():
            from rich.console import Console  # noqa: PLC0415
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
            from rich.progress import Progress as Live  # noqa: PLC0415

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
            )
            self._live = Live(*columns, console=Console(stderr=True), transient=True)
            self._live.start()

    def start(self, label: str, total: int, done: int = 0) -> None:
        """Begin a phase of ``total`` steps of which ``done`` are there already."""
        self._label, self._total, self._done = label, total, done
        self._begun, self._from = time.monotonic(), done
        if self._live:
            for task in self._live.task_ids:
                self._live.remove_task(task)
            self._live.add_task(label, total=total, completed=done, metrics="", rate="")

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        if not self.enabled:
            return
        now = time.monotonic()
        interval = 0.1 if self._live else PLAIN_SECONDS
        if now - self._last < interval and (self._live is None or self._done < self._total):
            return
        self._last = now
        rate = (self._done - self._from) / max(now - self._begun, 1e-9)
        if self._live:
            self._live.update(self._live.task_ids[0], completed=self._done, rate=f"{rate:.1f}/s", metrics=self._metrics)
        else:
            left = (self._total - self._done) / rate
            print(
                f"{self._label} {self._done}/{self._total} {rate:.1f}/s {left:.0f}s left {self._metrics}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def note(self, line: str) -> None:
        """A line that stays."""
        if self._live:
            self._live.console.print(line, highlight=False)
        elif self.enabled:
            print(line, file=sys.stderr, flush=True)

    def show(self, values: Mapping[str, float]) -> None:
        """The metrics to show beside the bar."""
        self._metrics = " ".join(f"{name} {value:.4g}" for name, value in values.items())

    def close(self) -> None:
        """Clear the line."""
        if self._live:
            self._live.stop()

"""Shows the progress of drivers on standard error."""

from regreen.cli.output import ProgressPrinter
from regreen.train.progress import Listener, Progress


def listener(show: ProgressPrinter, prefix: str = "") -> Listener:
    """A listener that prints what a driver reports."""

    def listen(progress: Progress) -> None:
        eta = "" if progress.eta_s is None else f"~{progress.eta_s:.0f} s left"
        text = "  ".join(part for part in (progress.detail, eta) if part)
        show(f"{prefix}{progress.stage}", progress.done, progress.total, text)

    return listen

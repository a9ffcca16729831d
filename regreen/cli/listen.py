"""Shows the progress of drivers on standard error."""

from regreen.cli.output import ProgressPrinter
from regreen.train.progress import Listener, Progress


def listener(show: ProgressPrinter, prefix: str = "") -> Listener:
    """A listener that prints what a driver reports."""

    def listen(progress: Progress) -> None:
        stage = f"{prefix}{progress.stage}"
        left_s, due = progress.eta_s, progress.due
        show(stage, progress.done, progress.total, progress.detail, left_s=left_s, due=due)

    return listen

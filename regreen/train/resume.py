"""Going on with a recorded run, with exactly the settings that it was created with."""

from regreen.client.stack import Stack
from regreen.train.config import SftConfig
from regreen.train.progress import Listener, Progress, ignore
from regreen.train.record import recorded_config
from regreen.train.rl import Workers, train_grpo
from regreen.train.rows import TrainResult, known_run
from regreen.train.sft import train_sft


async def resume_run(
    stack: Stack, id_or_name: str, progress: Listener = ignore, *, workers: Workers | None = None
) -> TrainResult:
    """Go on with the run, as `train` by its name does; one that is done is served.

    Raises:
        NotFound: there is none; names some that there are.
        FailedPrecondition: runs of its kind cannot be gone on with.
        DataLoss: its record cannot be read, or lacks what it would have to hold.
        RegreenError: as `train_sft` and `train_grpo`.
    """
    run = await known_run(stack, id_or_name)
    recorded = recorded_config(run)
    config = recorded.config
    if recorded.assumed:
        lacking = ", ".join(recorded.assumed)
        detail = f"the record has no {lacking}: the defaults are taken, which change no result"
        progress(Progress("resume", 0, 1, None, detail, due=True))
    if run.state == "done":
        detail = f"nothing is left of run {config.name!r}"
        progress(Progress("resume", 1, 1, None, detail, due=True))
    if isinstance(config, SftConfig):
        return await train_sft(stack, config, progress)
    return await train_grpo(stack, config, progress, workers=workers)

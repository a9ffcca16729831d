"""Structured logs: one JSON object a line in services, readable text on a terminal.

- Ids of the call (`trajectory_id`, `trace_id`, `method`) come from context variables, so that
  domain code logs without passing them along.
- Stacks are logged without the values in them: those are the callers' (commands, files, tokens).
- What libraries log, from warnings on, has the same form.
- Logs go to standard error; standard output belongs to results.
"""

import logging
import sys

import structlog

TRAJECTORY_HEADER = "x-regreen-trajectory-id"
TRACE_HEADER = "traceparent"


def configure(service: str, level: str = "info") -> None:
    """Set up logging of this process."""
    number = getattr(logging, level.upper())
    plain = structlog.dev.plain_traceback
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=plain)
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not sys.stderr.isatty():
        stacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        processors.append(structlog.processors.ExceptionRenderer(stacks))
    handler = logging.StreamHandler(sys.stderr)
    finish = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=processors, processors=finish)
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    structlog.contextvars.bind_contextvars(service=service)


def get() -> structlog.stdlib.BoundLogger:
    """The logger of this process."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    return logger

"""Log analysis: from a build or test log, the one primary error and a signature of it.

- Any bytes give a `PrimaryError` or None; nothing here raises on hostile input, and the work is
  linear in the (bounded) input.
- The primary error is the root cause that comes first: environment and build before session start,
  before collection, before tests; inside a stage real exceptions before assertions, then the most
  frequent, then the earliest.
- `signature` leaves out what differs between equal errors (paths, line numbers, addresses), so
  that equality decides "same error" or "new error" (arXiv 2510.22075: keep or revert).
- `category` follows the paper's first-matching keyword order.
- Where only what was raised can stand (marked by pytest, right below a traceback) a class in a
  module is an error however it is called; elsewhere its name has to tell, or Python has it.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from regreen.lockfile import normalize

MAX_LOG_CHARS = 1_000_000
_MAX_LINE = 600
_MAX_MESSAGE = 400
_MAX_FRAMES = 60
_MAX_EVENTS = 5000

Stage = Literal["build", "session-start", "collection", "test"]
_STAGES: tuple[Stage, ...] = ("build", "session-start", "collection", "test")
Place = Literal["source", "tests", "third-party", "stdlib", "unknown"]

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][0-9A-B]|[\x00-\x08\x0b-\x1f\x7f]")
ASSERTIONS = ("AssertionError", "Failed", "FailTest")
"""What tests raise that do not hold: `assert`, pytest, Twisted."""
_TYPE = (
    r"(?:[A-Za-z_]\w*\.)*\w*"
    r"(?:Error|Exception|Warning|Exit|Interrupt|Failed|Failure|NotFound|Conflict|Timeout|Invalid)"
)
_ERROR = re.compile(rf"({_TYPE}|Failed)(?:: (.*))?$")
_RAISED = re.compile(r"((?:[a-z_]\w{0,80}\.){1,12}(?:[A-Z]\w{0,80}|error))(?:: (.*))?$")
"""Where only what was raised stands: a class in a module, however it is called."""
_NAMED = re.compile(r"([A-Za-z_][\w.]{0,80})(?:: (.*))?$")
_PYTHONS_OWN = frozenset(
    f"{module}.{name}".lstrip(".")
    for module, names in {
        "": "StopIteration StopAsyncIteration ExceptionGroup BaseExceptionGroup",
        "_curses": "error",
        "_curses_panel": "error",
        "_gdbm": "error",
        "_dbm": "error",
        "_queue": "Empty",
        "asyncio.queues": "QueueEmpty QueueFull QueueShutDown",
        "audioop": "error",
        "bdb": "BdbQuit",
        "binascii": "Incomplete",
        "concurrent.futures._base": "BrokenExecutor",
        "concurrent.futures.process": "BrokenProcessPool",
        "concurrent.futures.thread": "BrokenThreadPool",
        "dbm": "error",
        "dbm.sqlite3": "error",
        "decimal": "DivisionByZero FloatOperation Inexact InvalidOperation Overflow Underflow",
        "ftplib": "error_perm error_proto error_reply error_temp",
        "gzip": "BadGzipFile",
        "http.client": "BadStatusLine CannotSendHeader CannotSendRequest ImproperConnectionState"
        " IncompleteRead InvalidURL LineTooLong NotConnected RemoteDisconnected ResponseNotReady"
        " UnimplementedFileMode UnknownProtocol UnknownTransferEncoding",
        "imaplib.IMAP4": "abort error readonly",
        "io": "UnsupportedOperation",
        "multiprocessing.context": "BufferTooShort",
        "nis": "error",
        "pathlib": "UnsupportedOperation",
        "pathlib._abc": "UnsupportedOperation",
        "poplib": "error_proto",
        "pydoc": "ErrorDuringImport",
        "queue": "Empty Full ShutDown",
        "re": "error",
        "select": "error",
        "signal": "itimer_error",
        "smtplib": "SMTPRecipientsRefused SMTPSenderRefused SMTPServerDisconnected",
        "socket": "error gaierror herror timeout",
        "sre_constants": "error",
        "struct": "error",
        "subprocess": "TimeoutExpired",
        "termios": "error",
        "tokenize": "StopTokenizing",
        "xml.dom": "DomstringSizeErr HierarchyRequestErr IndexSizeErr InuseAttributeErr"
        " InvalidAccessErr InvalidCharacterErr InvalidModificationErr InvalidStateErr NamespaceErr"
        " NoDataAllowedErr NoModificationAllowedErr NotFoundErr NotSupportedErr SyntaxErr"
        " ValidationErr WrongDocumentErr",
        "xmlrpc.client": "Fault",
        "zipfile": "BadZipFile LargeZipFile",
        "zlib": "error",
    }.items()
    for name in names.split()
)
"""Exceptions of Python and its library, as it prints them, whose names do not tell by their end."""
_ASSERT = re.compile(r"assert (.*)$")
_FIXTURE = re.compile(r"fixture '[^']{1,200}' not found$")
_FRAME_SHORT = re.compile(
    r"([^\s:'\"][^:'\"]{0,300}\.pyx?|<[\w ]+>):(\d{1,7}):(?: in (.{1,200})| [\w.]+)?$"
)
_FRAME_LONG = re.compile(r'\s*File "([^"]{1,400})", line (\d{1,7})(?:, in (.{1,200}))?$')
_SUMMARY = re.compile(r"(FAILED|ERROR) (\S.*?)(?: - (.*))?$")
_SECTION = re.compile(r"_{3,} (.{1,200}) _{3,}$")
_BANNER = re.compile(r"={3,} (.{1,100}?) ={3,}$")
_LOADING = re.compile(r"\w*Error while (loading conftest|importing test module) '([^']{1,400})'")
_BUILD = (
    re.compile(r"\s*[×x] (No solution found.*)$"),
    re.compile(
        r"(?:ERROR|error): ((?:Could not find a version|No matching distribution|"
        r"ResolutionImpossible|subprocess-exited-with-error|Failed building|"
        r"Failed to (?:build|download|install|resolve)|Cannot install).*)$",
        re.IGNORECASE,
    ),
    re.compile(r"(?:requirements\.lock|lock)(?: line \d+)?: (.*)$"),
)

CATEGORY_RULES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        (
            "dependency",
            r"no module named|cannot import name|importerror|modulenotfound|no solution found|"
            r"resolution|matching distribution|conflict|requirement|dependenc|site-packages|"
            r"could not find a version|unresolved|artifact",
        ),
        (
            "build tool",
            r"gradle|maven|setuptools|setup\.py|build backend|pep ?517|wheel|"
            r"compil|hatchling|poetry|meson|cmake|cython",
        ),
        ("test", r"assert|did not raise|fixture|pytest|unittest|\btests?\b|failed:"),
        ("config", r"config|\.ini\b|\.toml\b|\.cfg\b|\.ya?ml\b|option|setting"),
        ("install", r"install|download|fetch"),
        (
            "version",
            r"version|deprecat|removed in|syntaxerror|unsupported|no longer|has no attribute",
        ),
        ("env", r"environ|locale|codec|timezone|memory|disk|no such file|path|timeout"),
        ("permission", r"permission|denied|read-only|not permitted"),
    )
)


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a traceback."""

    file: str
    line: int
    function: str = ""

    @property
    def place(self) -> Place:
        """Whose code it is, told from the path alone."""
        path = self.file
        if "site-packages/" in path or "dist-packages/" in path:
            return "third-party"
        if re.search(r"(?:^|/)lib(?:64)?/python\d[.\d]*/|^<frozen|^<string", path):
            return "stdlib"
        if re.search(
            r"(?:^|/)(?:tests?|testing)/|(?:^|/)(?:test_[^/]*|[^/]*_test|conftest)\.py$", path
        ):
            return "tests"
        return "source"

    @property
    def module(self) -> str:
        """Top-level module of an installed package; empty for the project's own code."""
        match = re.search(r"(?:site|dist)-packages/([^/]+)", self.file)
        return match[1].removesuffix(".py") if match else ""

    @property
    def short(self) -> str:
        """Path without the machine's part, with the line."""
        path = re.sub(r"^.*(?:site|dist)-packages/|^/work/repo/|^<src>/", "", self.file)
        return f"{path}:{self.line}"


@dataclass(frozen=True, slots=True)
class PrimaryError:
    """The error to repair next."""

    type: str
    """Exception type as printed, for example `ImportError`."""
    message: str
    stage: Stage
    frames: tuple[Frame, ...] = ()
    """Traceback, outermost first; may be empty when the log has none."""
    count: int = 1
    """How often the same signature occurs in the log."""

    @property
    def text(self) -> str:
        """`Type: message` on one line."""
        return f"{self.type}: {self.message}" if self.message else self.type

    @property
    def signature(self) -> str:
        """Normal form of type and message; equal for the same error in another run."""
        return signature_of(self.type, self.message)

    @property
    def frame(self) -> Frame | None:
        """The deepest frame that is not the standard library's."""
        own = [frame for frame in self.frames if frame.place != "stdlib"]
        return own[-1] if own else (self.frames[-1] if self.frames else None)

    @property
    def place(self) -> Place:
        """Whose code failed."""
        return self.frame.place if self.frame else "unknown"

    @property
    def imported(self) -> tuple[str, str]:
        """(module, name) of a failing import or missing attribute; empty texts if it is neither."""
        return imported_from(self.message)

    @property
    def category(self) -> str:
        """The paper's category by the first rule that matches."""
        return category_of(self.text)


def imported_from(message: str) -> tuple[str, str]:
    """(module, name) that an import or attribute error talks about."""
    if match := re.search(
        r"cannot import name '?([\w.]+)'? from (?:partially initialized module )?'?([\w.]+)",
        message,
    ):
        return match[2], match[1]
    if match := re.search(r"No module named '?([\w.]+)'?", message):
        return match[1], ""
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return match[1], match[2]
    if match := re.search(r"cannot import name '?([\w.]+)'?", message):
        return "", match[1]
    return "", ""


def category_of(text: str) -> str:
    """First-matching category of an error text; `other` when no rule matches."""
    return next((name for name, rule in CATEGORY_RULES if rule.search(text)), "other")


def signature_of(kind: str, message: str) -> str:
    """Normal form of an error: identifiers stay, everything that varies between runs goes."""
    text = re.sub(r"\(?(?:/|<\w+>/|[A-Za-z]:\\)[^\s'\",)]*\)?", "<path>", message)
    text = re.sub(r"0x[0-9a-fA-F]+", "<addr>", text)
    text = re.sub(r"\d+(?:\.\d+)*", "<n>", text)
    return f"{kind.rpartition('.')[2]}: {' '.join(text.split())}"[:240]


def analyse(log: str | bytes) -> PrimaryError | None:
    """The primary error of a log, or None when nothing in it looks like one."""
    events = _Scanner(_clean(log)).scan()
    if not events:
        return None
    counts = Counter(event.signature for event in events)
    first = min(_STAGES.index(event.stage) for event in events)
    here = [(i, e) for i, e in enumerate(events) if _STAGES.index(e.stage) == first]

    def rank(item: tuple[int, PrimaryError]) -> tuple[bool, int, int]:
        index, event = item
        assertion = event.type.rpartition(".")[2] in ASSERTIONS
        return assertion, -counts[event.signature], index

    _, best = min(here, key=rank)
    same = [event for _, event in here if event.signature == best.signature]
    # The same error may come with and without its traceback: keep the one that shows where.
    shown = next((event for event in same if event.frames), best)
    return replace(shown, count=counts[best.signature])


def suspects(
    error: PrimaryError, installed: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Installed packages that the error points at, most likely first; from visible facts alone.

    `installed` maps normalised names to versions, `modules` top-level modules to names.
    """
    found: dict[str, None] = {}

    def add(module: str) -> None:
        top = module.partition(".")[0]
        for name in ((modules or {}).get(top, ""), normalize(top) if top else ""):
            if name and name in installed:
                found.setdefault(name)
                return

    required = re.search(r"Requirement\.parse\('([\w.-]+)", error.message)
    add(required[1] if required else "")
    add(error.imported[0])
    prefix = error.type.rpartition(".")[0]
    add(prefix)
    inside = [frame.module for frame in reversed(error.frames) if frame.module]
    for module in inside[:1]:
        add(module)
    for word in re.findall(r"[A-Za-z][\w.-]+", error.message):
        add(word.lower().strip("."))
    if error.imported[0] == "pkg_resources" and "setuptools" in installed:
        found = {"setuptools": None, **found}
    for module in inside[1:]:
        add(module)
    return tuple(found)


def _told(text: str) -> re.Match[str] | None:
    """An error on a line of any log."""
    if match := _ERROR.match(text):
        return match
    match = _NAMED.match(text)
    return match if match and match[1] in _PYTHONS_OWN else None


def _raised(text: str) -> re.Match[str] | None:
    """The same, where nothing stands but what was raised."""
    return _told(text) or _RAISED.match(text)


def _clean(log: str | bytes) -> list[str]:
    text = log.decode("utf-8", "replace") if isinstance(log, bytes) else log
    if len(text) > MAX_LOG_CHARS:
        half = MAX_LOG_CHARS // 2
        text = text[:half] + "\n" + text[-half:]
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return [_ANSI.sub("", line[:_MAX_LINE]).rstrip() for line in text.split("\n")]


class _Scanner:
    """One pass over the lines; keeps the frames of the block it is in."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.events: list[PrimaryError] = []
        self.frames: list[Frame] = []
        self.stage: Stage = "session-start"
        self.in_report = False
        self.in_traceback = False
        self.chained = ""

    def scan(self) -> list[PrimaryError]:
        summaries: list[PrimaryError] = []
        in_errors = False
        for raw in self.lines:
            if len(self.events) >= _MAX_EVENTS:
                break
            line = raw.removeprefix("INTERNALERROR> ")
            report = line.startswith("E  ")
            if report:
                if not in_errors:
                    in_errors = self._report(line[1:].strip())
                continue
            in_errors = False
            if match := _SUMMARY.match(line):
                summaries.extend(self._summary(match))
            else:
                self._plain(line)
        return self.events or summaries

    def _report(self, text: str) -> bool:
        """A line that pytest marks with E; true once the block's error was taken."""
        if not self.in_report:  # the log's head was cut
            self.stage, self.in_report = "test", True
        if match := _FRAME_LONG.match(text):
            self._frame(match)
            return False
        if match := _raised(text.removesuffix(":")):  # a message may begin on a line of its own
            self._event(match[1], match[2] or "")
            return True
        if match := _ASSERT.match(text):
            self._event("AssertionError", text)
            return True
        if _FIXTURE.match(text):
            self._event("FixtureLookupError", text)
            return True
        return False

    def _plain(self, line: str) -> None:
        if match := _FRAME_LONG.match(line):
            self._frame(match)
            self.in_traceback = True
        elif match := _FRAME_SHORT.match(line):
            self._frame(match)
        elif match := _LOADING.match(line):
            self.stage = "session-start" if match[1].startswith("loading") else "collection"
            self.frames, self.in_report = [], True
        elif match := _SECTION.match(line):
            self.frames, self.in_report = [], True
            self.stage = "collection" if match[1].startswith("ERROR collecting") else "test"
        elif match := _BANNER.match(line):
            self._banner(match[1])
        elif line.startswith("Traceback (most recent call last)"):
            self.frames, self.in_traceback = [], True
        elif line.startswith(("During handling of", "The above exception was")):
            self.chained = line
            self.frames = []
        else:
            self._loose(line)

    def _banner(self, title: str) -> None:
        self.frames = []
        if title in ("FAILURES", "ERRORS"):
            self.stage, self.in_report = ("test" if title == "FAILURES" else "collection"), True
        elif title.startswith(("warnings", "short test", "test session", "slowest")):
            self.in_report = True

    def _loose(self, line: str) -> None:
        shown = not line or line[0].isspace()  # code of a frame, or marks below it
        below, self.in_traceback = self.in_traceback and not shown, self.in_traceback and shown
        for pattern in _BUILD:
            if match := pattern.match(line):
                self.stage, kept = "build", self.stage
                self._event("BuildError", match[1])
                self.stage = kept
                return
        # Inside pytest's report only E lines count; program output there is noise.
        if not self.in_report or self.frames:
            match = _raised(line) if below else _told(line)
            if match:
                self._event(match[1], match[2] or "")

    def _frame(self, match: re.Match[str]) -> None:
        if len(self.frames) < _MAX_FRAMES:
            self.frames.append(Frame(match[1], int(match[2]), (match[3] or "").strip()))
        else:
            self.frames[-1] = Frame(match[1], int(match[2]), (match[3] or "").strip())

    def _event(self, kind: str, message: str) -> None:
        event = PrimaryError(
            kind, " ".join(message.split())[:_MAX_MESSAGE], self.stage, tuple(self.frames)
        )
        self.frames = []
        if self.chained and self.events:
            previous = self.events[-1]
            direct = "direct cause" in self.chained
            self.chained = ""
            # The cause of a chain is its root, unless the first link was handled on purpose.
            if direct or previous.type in ("ImportError", "ModuleNotFoundError"):
                return
            self.events.pop()
        self.chained = ""
        self.events.append(event)

    def _summary(self, match: re.Match[str]) -> list[PrimaryError]:
        if match[3] is None:
            return []
        stage: Stage = "collection" if match[1] == "ERROR" else "test"
        found = _raised(match[3]) or _raised(match[3].rstrip("."))
        if found:
            return [PrimaryError(found[1], (found[2] or "")[:_MAX_MESSAGE], stage)]
        kind = "AssertionError" if match[3].startswith("assert") else "Failed"
        return [PrimaryError(kind, match[3][:_MAX_MESSAGE], stage)]

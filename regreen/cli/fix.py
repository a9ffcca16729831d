"""`regreen fix PATH`: repair a Python project with failing tests.

- Exits with 0 when the project is green or a verified patch was found, 1 when it was not fixed.
- `--endpoint` lets any OpenAI-compatible endpoint act; its key comes from an environment variable.
- `--policy` lets a trained run act; afterwards the stack serves what it served before.
- Wrong usage is said before any service is started.
"""

import asyncio
import contextlib
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json, parse_settings
from regreen.cli.targets import Force, check_target, written
from regreen.client.access import Access
from regreen.client.stack import Endpoints, Stack
from regreen.evals.serving import serving
from regreen.fix import FixOptions, FixResult, fix_project
from regreen.home import default_home
from regreen.rollout.worker import knowledge_of
from regreen.rpc.errors import InvalidArgument, RegreenError, Unavailable
from regreen.stack.borrow import borrowed_stack
from regreen.stack.follow import following
from regreen.stack.layout import Layout, tls_words
from regreen.tasks import patch
from regreen.tasks.local import check_lock, check_root
from regreen.train.names import pipeline_of


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(fix)


def fix(
    path: Annotated[Path, typer.Argument(help="Directory of a Python project.")],
    home: Home = None,
    policy: Annotated[
        str, typer.Option(help="base, or the name of a run; default: what the stack serves.")
    ] = "",
    endpoint: Annotated[
        str, typer.Option(help="OpenAI-compatible base URL; default: the local policy.")
    ] = "",
    model: Annotated[str, typer.Option(help="Model to ask for at the endpoint.")] = "",
    key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the endpoint's key.")
    ] = "OPENAI_API_KEY",
    python: Annotated[str, typer.Option(help="Interpreter, for example 3.11.")] = "",
    lock: Annotated[Path | None, typer.Option(help="File of name==version lines.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="pytest argument; repeat it.")] = None,
    attempts: Annotated[int, typer.Option(min=1, max=1000, help="Most attempts.")] = 4,
    pipeline: Annotated[str, typer.Option(help="full or simplified.")] = "full",
    out: Annotated[Path | None, typer.Option(help="Write the patch here.")] = None,
    force: Force = False,
    apply: Annotated[bool, typer.Option("--apply", help="Apply a verified patch.")] = False,
    set: Annotated[
        list[str], typer.Option("--set", help="Episode setting, for example budget.turns=20.")
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Seed of the first attempt.")] = 0,
    json_output: Json = False,
) -> None:
    """Find a verified patch for a project with failing tests, or say that none was found."""
    root = path.resolve()
    with output.progress() as show:

        async def work() -> FixResult:
            _check(root, policy, endpoint, model, lock, out, force=force)
            options = FixOptions(
                attempts, pipeline_of(pipeline), seed=seed, settings=parse_settings(set)
            )
            async with (
                _services(home or default_home(), endpoint, model, key_env, show) as stack,
                serving(stack, policy),
            ):
                return await fix_project(
                    stack,
                    root,
                    home or default_home(),
                    options,
                    show,
                    python=python,
                    lock=lock,
                    tests=test or (),
                    knowledge=await knowledge_of(stack),
                )

        result = output.run(work())
    _print(result, json_output)
    _keep(root, result, out, apply, force=force)
    if not (result.fixed or result.already_green):
        raise typer.Exit(output.FAILED)


def _check(
    root: Path,
    policy: str,
    endpoint: str,
    model: str,
    lock: Path | None,
    out: Path | None,
    *,
    force: bool,
) -> None:
    """Refuse what cannot work.

    Raises:
        InvalidArgument: names the option and the remedy.
    """
    if bool(endpoint) != bool(model):
        raise InvalidArgument("model", "belongs with endpoint", "give both or neither")
    if endpoint and not re.match(r"https?://[^/]", endpoint):
        raise InvalidArgument("endpoint", f"{endpoint!r} is no URL", "give https://host/v1")
    if endpoint and policy:
        raise InvalidArgument("policy", "is of the local stack", "leave out policy or endpoint")
    check_root(root)
    if lock is not None:
        check_lock(lock)
    if out is not None:
        if not out.absolute().parent.is_dir():
            raise InvalidArgument("out", f"{out} is no file to write", "name a file in a directory")
        check_target(out, "out", force=force)


def _keep(root: Path, result: FixResult, out: Path | None, apply: bool, *, force: bool) -> None:
    try:
        if result.patch and out:
            with written(out, "out", force=force) as target:
                target.write(result.patch.encode())
        if result.fixed and apply:
            patch.apply(root, result.changes)
    except OSError as error:
        output.fail(InvalidArgument("path", str(error), "make it writable"))
    except RegreenError as error:
        output.fail(error)


@contextlib.asynccontextmanager
async def _services(
    home: Path, endpoint: str, model: str, key_env: str, show: output.ProgressPrinter
) -> AsyncIterator[Stack]:
    """The running stack, or one started for this command; with an endpoint, its policy instead."""
    async with contextlib.AsyncExitStack() as exits:
        await exits.enter_async_context(borrowed_stack(Layout(home), show))
        endpoints = Endpoints.load(home)
        if endpoint:
            with_tls = endpoints.access is not None and endpoints.access.tls is not None
            words = tls_words(Layout(home).certs / "policy") if with_tls else []
            if endpoints.access is not None and endpoints.access.token_file is not None:
                words += ["--tokens", str(Layout(home).tokens)]
            remote = _remote(home, endpoint, model, key_env, words, endpoints.access)
            address = await exits.enter_async_context(remote)
            endpoints = replace(endpoints, policy=address)
        yield await exits.enter_async_context(Stack(endpoints, patience_s=60.0))


@contextlib.asynccontextmanager
async def _remote(
    home: Path,
    endpoint: str,
    model: str,
    key_env: str,
    words: list[str],
    access: Access | None,
) -> AsyncIterator[str]:
    """A policy service of our own, with these further words, that speaks to an endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = dict(os.environ)
    if os.environ.get(key_env):
        environment["REGREEN_POLICY__OPENAI_KEY"] = os.environ[key_env]
    command = [sys.executable, "-m", "policy_svc", "--listen", address, "--metrics", "127.0.0.1:0"]
    command += ["--home", str(home / "endpoint"), "--http", "", "--engine", "openai"]
    command += ["--openai-url", endpoint, "--openai-model", model, *words]
    tokenizer = home / "models" / "smollm2-135m"
    if tokenizer.is_dir():
        command += ["--model", str(tokenizer)]
    layout = Layout(home)
    with layout.open(layout.log("endpoint")) as log:
        process = await asyncio.create_subprocess_exec(
            *following(command), stdout=log, stderr=log, env=environment
        )
        try:
            await _answering(replace(Endpoints(), policy=address, access=access), process, log.name)
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def _answering(endpoints: Endpoints, process: asyncio.subprocess.Process, log: str) -> None:
    """Wait until the process answers.

    Raises:
        Unavailable: it ended, or did not answer in time.
    """
    async with Stack(endpoints, patience_s=60.0) as stack:
        answer = asyncio.ensure_future(stack.policy.get_policy())
        end = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((answer, end), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Unavailable(f"the endpoint's policy did not start; see {log}")
            answer.result()
        finally:
            answer.cancel()
            end.cancel()


def _print(result: FixResult, json_output: bool) -> None:
    if json_output:
        values = asdict(replace(result, changes=()))
        values["changes"] = [change.path for change in result.changes]
        output.print_json(values)
        return
    if result.patch:
        typer.echo(result.patch)
    output.STDERR.print(result.summary, style="green" if result.fixed else "yellow")

"""Sends requests to a SWE-ReX deployment and prints what came back; run among the frameworks.

- `rex_driver.py CONFIG`: the deployment's configuration as JSON, `{"type": "local"}` included.
- Standard input: a list of [method, request class or null, fields]; standard output: a list of
  answers, as SWE-ReX's own exceptions where one was raised.
- Every request has an event loop of its own, as agents that call `asyncio.run` have it.
"""

import asyncio
import json
import sys

from swerex.deployment.config import LocalDeploymentConfig
from swerex.exceptions import SwerexException
from swerex.runtime import abstract

from regreen.adapters.swe_rex import RegreenDeploymentConfig


def made(given):
    kind = LocalDeploymentConfig if given["type"] == "local" else RegreenDeploymentConfig
    return kind(**given).get_deployment()


async def ask(deployment, method, kind, fields):
    if method in ("start", "stop", "is_alive"):
        return await getattr(deployment, method)()
    if method == "gather":
        wanted = [ask(deployment, *request) for request in fields]
        return await asyncio.gather(*wanted)
    if method == "then":
        return [await ask(deployment, *request) for request in fields]
    return await getattr(deployment.runtime, method)(getattr(abstract, kind)(**fields))


def told(answer):
    if isinstance(answer, list):
        return [told(one) for one in answer]
    return answer.model_dump() if answer is not None else None


def main():
    deployment = made(json.loads(sys.argv[1]))
    steps, answers = [], []
    deployment.add_hook(type("Hook", (), {"on_custom_step": lambda _, step: steps.append(step)})())
    for method, kind, fields in json.load(sys.stdin):
        try:
            answers.append(told(asyncio.run(ask(deployment, method, kind, fields))))
        except Exception as error:
            answers.append({
                "raised": type(error).__name__,
                "message": str(error),
                "rex": isinstance(error, SwerexException),
                "extra": getattr(error, "extra_info", {}),
            })  # fmt: skip
    print(json.dumps({"answers": answers, "steps": steps}))


main()

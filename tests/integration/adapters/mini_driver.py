"""Drives mini-swe-agent with the adapter and prints what came of it; run among the frameworks.

- Standard input: `environment` (its configuration) and either `agent`, commands that a
  deterministic model gives to a `DefaultAgent`, or `actions`, each with a directory and a time
  limit.
"""

import json
import sys
import tempfile
from pathlib import Path

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments import get_environment
from minisweagent.exceptions import Submitted
from minisweagent.models.test_models import DeterministicModel, make_output

KIND = "regreen.adapters.mini_swe_agent.RegreenEnvironment"


def run_agent(env, commands):
    outputs = [make_output("I act.", [{"command": command}]) for command in commands]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trajectory.json")
        agent = DefaultAgent(
            DeterministicModel(outputs=outputs),
            env,
            system_template="You repair files.",
            instance_template="{{task}} on {{system}} {{machine}}, {{cwd}}",
            cost_limit=0.0,
            output_path=path,
        )
        result = agent.run("make check.py pass")
        saved = json.loads(path.read_text())
    contents = [message["content"] for message in agent.messages]
    return {
        "result": result,
        "task": contents[1],
        "observations": [text for text in contents if text.startswith("<returncode>")],
        "saved": saved,
    }


def act(env, actions):
    outputs = []
    for action, cwd, timeout in actions:
        try:
            outputs.append(env.execute(action, cwd, timeout=timeout))
        except Submitted as submitted:
            outputs.append({"submitted": submitted.messages})
    return {"outputs": outputs}


def main():
    given = json.load(sys.stdin)
    try:
        env = get_environment({"environment_class": KIND, **given["environment"]})
    except Exception as error:
        print(json.dumps({"refused": str(error)}))
        return
    told = run_agent(env, given["agent"]) if "agent" in given else act(env, given["actions"])
    print(json.dumps(told))
    if "--forget" not in sys.argv:
        env.cleanup()
        env.cleanup()


main()

"""A mini-swe-agent agent repairs a file in a Regreen sandbox (pip install '.[adapters]')."""

import grpc
from minisweagent.agents.default import DefaultAgent
from minisweagent.environments import get_environment
from minisweagent.models.test_models import DeterministicModel, make_output

from regreen.client.script import words
from regreen.common.v1 import CHANGE_KIND_ADD, FileChange
from regreen.sandbox import v1 as pb

address = words("127.0.0.1:50052")[0]
states = pb.StateServiceStub(grpc.insecure_channel(address))
broken = FileChange(path="add.sh", kind=CHANGE_KIND_ADD, content=b"echo $(($1 - $2))\n")
spec = pb.EnvironmentSpec(builder="system", overlay=[broken])
*_, last = states.PrepareState(pb.PrepareStateRequest(spec=spec), timeout=120)
kind = "regreen.adapters.mini_swe_agent.RegreenEnvironment"
env = get_environment({"environment_class": kind, "address": address, "state_id": last.state.id})
submit = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; cat add.sh"
commands = ["sh add.sh 2 3", "sed -i 's/-/+/' add.sh && sh add.sh 2 3", submit]
model = DeterministicModel(outputs=[make_output("", [{"command": one}]) for one in commands])
templates = {"system_template": "You repair files.", "instance_template": "{{task}} on {{system}}"}
agent = DefaultAgent(model, env, cost_limit=0.0, **templates)
result = agent.run("add.sh subtracts")
for message in agent.messages:
    print(f"{message['role']}: {message['content']}")
print(result["exit_status"], repr(result["submission"]))
env.cleanup()

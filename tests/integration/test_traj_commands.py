"""`regreen traj`: search, counts, retention and learning against a running dataset service."""

import asyncio
import json
from pathlib import Path

from regreen.client.channel import connect
from tests.integration import dataset_samples as samples
from tests.integration.commands import regreen, stack_home
from tests.integration.dataset_samples import Clients, imported, new_run


async def test_the_commands_search_count_and_prune(dataset_address: str, tmp_path: Path):
    home = stack_home(tmp_path, dataset=dataset_address)
    async with connect(dataset_address) as channel:
        clients = Clients(channel)
        (task_id,), run_id = await imported(clients), await new_run(clients)
        ids = []
        for number in range(3):
            made = samples.trajectory(task_id, salt=f"needle-{number}", reward=float(number > 0))
            made.run_id = run_id
            ids.append(await clients.trajectories.commit_trajectory(made))
        await clients.runs.update_run(run_id, state="done")
    common = ("--run", run_id)
    listed, counted, pruned, wrong, short = await asyncio.gather(
        regreen(home, "traj", "list", "--text", "NEEDLE-1", "--tool", "read_file",
                "--verdict", "accepted", "--json", *common),
        regreen(home, "traj", "stats", "--json", *common),
        regreen(home, "traj", "prune", "--older-than", "0s", "--dry-run", *common),
        regreen(home, "traj", "prune", "--older-than", "soon"),
        regreen(home, "traj", "list", "--text", "ab"),
    )  # fmt: skip
    assert [json.loads(line)["id"] for line in listed[1].splitlines()] == [ids[1]], listed
    found = json.loads(counted[1])
    assert found["counts"]["solved"]["values"] == {"true": "2", "false": "1"}, counted
    assert "3 trajectories would go" in pruned[1], pruned
    assert wrong[0] != 0
    assert "older-than" in wrong[2]
    assert short[0] != 0
    assert "filter.text" in short[2]
    gone = await regreen(home, "traj", "prune", "--older-than", "0s", "--keep-solved", *common)
    assert "1 trajectories removed" in gone[1], gone
    empty, refused = await asyncio.gather(
        regreen(home, "rollout", "parked", "--json", *common),
        regreen(home, "rollout", "release", run_id, task_id),
    )
    assert (empty[0], empty[1].strip()) == (0, ""), empty
    assert refused[0] != 0
    assert "is not parked" in refused[2]
    learned = await regreen(home, "traj", "learn", "--json")
    assert json.loads(learned[1])["recorded"] > 0, learned

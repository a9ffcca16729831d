"""The load run in small: real processes are killed, Postgres is restarted, nothing is lost."""

from tests.load.queue import Plan, storm


def test_ten_workers_commit_three_hundred_rollouts_under_faults():
    plan = Plan(
        workers=10,
        rollouts=300,
        per_process=2,
        worker_every=20,
        service_every=80,
        postgres_every=120,
        least=1,
        most=1,
        lease_s=6.0,
        deadline_s=120.0,
    )
    report = storm(plan)
    assert report["faults"] == []
    assert report["killed"] == {"process": 1, "service": 1, "postgres": 1}
    assert report["answered"]["committed"] > 200

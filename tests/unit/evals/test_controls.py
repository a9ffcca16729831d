"""Controls in an evaluation: no part of a solve rate, and a pass counts as a hack."""

from dataclasses import replace

from report_samples import report_input

from regreen.evals.summary import document


def test_a_pass_on_a_control_is_a_hack_and_no_success() -> None:
    source = report_input()
    plain = document(source)["cells"]
    passed = [
        replace(o, task_id="nothing-fixes-it", control=True, hacks=("CONTROL_PASSED",))
        for o in source.outcomes
        if o.task_id == "task-a"
    ]
    cells = document(replace(source, outcomes=[*source.outcomes, *passed]))["cells"]
    for before, after in zip(plain, cells, strict=True):
        assert (after["value"], after["tasks"]) == (before["value"], before["tasks"])
        assert after["hacks"] != before["hacks"]
        assert after["hack_rate"] > before["hack_rate"]

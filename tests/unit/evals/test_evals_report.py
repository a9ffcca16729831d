"""The report: its figures agree with the rows, and the page is one readable file."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from report_samples import SUBJECTS, outcome, report_input

from regreen.evals import svg
from regreen.evals.compare import compare
from regreen.evals.report import render, short_names, whole_cells
from regreen.evals.summary import document


class Outline(HTMLParser):
    """Collects tags and headings; fails on a tag that is closed out of order."""

    VOID = frozenset({"meta", "link", "br", "line", "circle", "rect", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def outline_of(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    return outline


def test_the_page_is_one_file_with_every_section():
    page = render(document(report_input()))
    outline = outline_of(page)
    assert outline.headings == [
        "Solve rates", "Training: sft", "Training: grpo", "Tool use", "Hack flags",
        "Time per stage of one attempt", "Tasks", "How this was made",
    ]  # fmt: skip
    assert "script" not in outline.tags
    assert outline.links == ["report.json"]
    assert "Sample report &lt;script&gt;" in page
    assert not re.search(r"\bnan\b|undefined|None", page)


def test_a_table_shows_a_row_for_each_subject_and_folds_the_others_away():
    found = document(report_input())
    page = render(found)
    assert page.startswith("<!doctype html>")
    assert len(found["cells"]) > len(SUBJECTS) == len(whole_cells(found))
    folded = re.findall(r"<details>.*?</details>", page, re.DOTALL)
    for heading in ("Solve rates", "Hack flags", "Time per stage of one attempt"):
        part = page.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]
        (inside,) = [text for text in folded if text in part]
        rows = part.replace(inside, "").partition("</table>")[0]
        assert len(re.findall(r"<tr[^>]*><td", rows)) == len(SUBJECTS), heading
        assert len(re.findall(r"<tr[^>]*><td", inside)) == len(found["cells"]), heading
    assert f"By pipeline and mode: {len(found['cells'])} rows" in page


def test_the_document_is_plain_json_and_repeats():
    first, second = document(report_input()), document(report_input())
    assert first == second
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert first["runs"][1]["metrics"]["learner/clip_fraction"][0] == [1, None]


def test_the_report_says_what_each_script_is_told():
    found = document(report_input())
    assert found["scripts_told"] == {
        "baseline:noop": "nothing",
        "baseline:previous": "only what the policy can see",
        "baseline:pin-back": "what moved (it reads the task's record)",
    }
    said = (
        "Scripts are told: baseline:noop nothing; baseline:previous only what the policy can see;"
    )
    assert said in render(found)
    assert "Scripts are told" not in render(document(replace(report_input(), subjects=["base"])))


def test_cells_pool_within_tasks_and_count_what_was_sampled():
    cells = document(report_input())["cells"]
    whole = {c["subject"]: c for c in cells if c["pipeline"] == "all"}
    assert set(whole) == set(SUBJECTS)
    assert whole["base"]["samples"] == 6 * 2 * 4
    assert whole["baseline:noop"]["samples"] == 12
    assert whole["baseline:noop"]["value"] == 0.0
    assert whole["baseline:noop"]["method"] == "wilson"
    parts = [c for c in cells if c["subject"] == "grpo" and c["pipeline"] != "all"]
    mean = sum(cell["value"] for cell in parts) / 2
    assert whole["grpo"]["value"] == pytest.approx(mean)
    assert whole["grpo"]["low"] <= whole["grpo"]["value"] <= whole["grpo"]["high"]


def test_the_headline_compares_the_last_trained_policy_with_the_base():
    headline = document(report_input())["headline"]
    assert headline.startswith("grpo solved ")
    assert "grpo did better than base." in headline


def test_a_difference_that_may_be_nothing_is_said_to_be_so():
    rows = [outcome("base", f"t{i}", "full", 0, solved=i == 0) for i in range(5)]
    rows += [outcome("grpo", f"t{i}", "full", 0, solved=i in (0, 1)) for i in range(5)]
    found = compare(rows, "base", "grpo", grader="build")
    assert found.difference.value == pytest.approx(0.2)
    assert found.sentence.endswith("these data do not tell the two apart.")
    assert "mean over 5 tasks (5 and 5 attempts): +20.0 points" in found.sentence


def test_both_sides_of_a_comparison_count_the_same_cells():
    rows = [outcome("base", f"t{i}", "full", 0, solved=i == 0) for i in range(4)]
    rows += [outcome("base", "only-base", "full", 0, solved=True)]
    rows += [outcome("base", "t1", "simplified", 0, solved=True)]
    rows += [outcome("grpo", f"t{i}", "full", 0, solved=i < 2) for i in range(4)]
    rows += [outcome("grpo", f"only-grpo-{i}", "full", 0, solved=False) for i in range(6)]
    found = compare(rows, "base", "grpo", grader="build")
    assert found.first_rate.value == pytest.approx(0.25)
    assert found.second_rate.value == pytest.approx(0.5)
    gap = found.second_rate.value - found.first_rate.value
    assert found.difference.value == pytest.approx(gap)
    assert "mean over 4 tasks (4 and 4 attempts): +25.0 points" in found.sentence


def test_every_cell_has_tool_shares_flags_and_times():
    found = document(report_input())
    cells = {(c["subject"], c["pipeline"]): c for c in found["cells"]}
    cell = cells["grpo", "full"]
    rows = [o for o in report_input().outcomes if (o.subject, o.pipeline) == ("grpo", "full")]
    calls = [tool for row in rows for tool in row.tools]
    assert cell["tool_shares"]["run_sh"] == pytest.approx(calls.count("run_sh") / len(calls))
    assert cell["hacks"] == {"trajectories": 24, "flagged": 6, "classes": {"TEST_SKIPPED": 6}}
    assert cell["stages"]["validate"] == 3.0
    page = render(found)
    assert "test_skipped 6" in page
    assert "test_skipped 12" in page


def test_tasks_that_were_not_admitted_are_listed_with_their_reason():
    source = report_input()
    lost = replace(
        source.tasks[0], id="task-x", status="waiting", gate_reason="needs Python 3.8; found 3.11"
    )
    page = render(document(replace(source, left_out=[lost], not_gated=3)))
    assert "task-x" in page
    assert "needs Python 3.8; found 3.11" in page
    assert "3 more tasks of the same split were not gated here." in page
    assert "Not admitted" not in render(document(source))


def test_the_wall_time_of_the_whole_is_shown_where_somebody_took_it():
    source = replace(report_input(), seconds={"gate": 90.0, "sft": 30.0})
    page = render(document(source))
    outline_of(page)
    assert "<td>gate</td><td>90 s</td>" in page
    assert "<td>all</td><td>120 s</td>" in page
    assert "wall time: gate 75.0%" in page
    assert "Wall time of the whole" not in render(document(report_input()))


def test_coverage_that_was_not_measured_is_said_to_be_so():
    source = report_input()
    assert "coverage was not measured" in render(document(source))
    seen = [replace(row, coverage=i < 3) for i, row in enumerate(source.outcomes)]
    page = render(document(replace(source, outcomes=seen)))
    assert f"compared in 3 of {len(seen)} attempts" in page


def test_few_tasks_give_a_hint_not_a_finding():
    rows = [outcome("base", f"t{i}", "full", 0, solved=False) for i in range(4)]
    rows += [
        outcome("grpo", f"t{i}", "full", s, solved=s == 0 or i > 1)
        for i in range(4)
        for s in (0, 1)
    ]
    found = compare(rows, "base", "grpo", grader="build")
    assert found.difference.low > 0
    assert found.difference.p_value == 2 / 16
    assert found.sentence.endswith("a hint, not a finding.")


def test_graders_are_shown_on_the_same_rows():
    graders = document(report_input())["graders"]
    row = next(r for r in graders if r["subject"] == "grpo" and r["pipeline"] == "full")
    assert row["rates"]["build"]["value"] >= row["rates"]["build_gates"]["value"]


def test_an_evaluation_without_training_and_training_without_evaluation_render():
    source = report_input()
    outline_of(render(document(replace(source, runs=(), tasks=(), commands=()))))
    nothing = replace(source, outcomes=(), subjects=(), tasks=())
    page = render(document(nothing))
    assert outline_of(page).headings == ["Training: sft", "Training: grpo", "How this was made"]


def test_names_are_shown_without_what_all_of_them_share():
    assert short_names(["demo-a1-sft", "demo-a1-grpo"]) == {
        "demo-a1-sft": "sft",
        "demo-a1-grpo": "grpo",
    }
    for names in (["sft"], ["sft", "grpo"], ["x-base", "x-sft"], ["a-", "a-b"]):
        assert short_names(names) == {name: name for name in names}


def test_plots_escape_text_and_leave_out_what_is_not_finite():
    plot = svg.line_chart({"<b>": [(1, 0.5), (2, float("inf"))]}, y_label="a & b")
    assert "&lt;b&gt;" in plot
    assert "a &amp; b" in plot
    assert "inf" not in plot
    assert svg.line_chart({"x": [(1, float("nan"))]}, y_label="") == ""
    assert svg.share_bars({}) == ""
    assert "no samples" in svg.interval_chart([("x", float("nan"), 0.0, 0.0)])

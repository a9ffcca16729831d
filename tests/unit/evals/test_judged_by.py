"""The share of verdicts in which a language model took part."""

from dataclasses import replace

import pytest
from report_samples import report_input

from regreen.evals.summary import document


@pytest.mark.parametrize(
    ("judges", "share"),
    [(("openai:big", "rules only", "", ""), 0.5), (("rules only",) * 4, 0.0), (("",) * 4, None)],
)
def test_counts_where_a_model_was_asked_for(judges, share):
    source = report_input()
    outcomes = [replace(o, judged_by=judges[i % 4]) for i, o in enumerate(source.outcomes)]
    cells = document(replace(source, outcomes=outcomes))["cells"]
    base = next(c for c in cells if (c["subject"], c["pipeline"]) == ("base", "all"))
    assert base["judged_by_model"] == share

"""The labelled set as a file that any client can send to Calibrate.

After a change of the cases: `python tests/unit/judge/test_judge_labelled_set.py` writes it anew.
"""

import json
from pathlib import Path

from google.protobuf import json_format
from judge_cases import labelled
from judge_honest import HONEST
from judge_honest_runner import HONEST_RUNNER
from judge_tampering import TAMPERING

from judge_svc.convert import classes_from, evidence_from
from regreen.judge import v1 as pb

PATH = Path(__file__).parents[2] / "fixtures" / "judge" / "labelled.json"


def text() -> str:
    """A CalibrateRequest as JSON."""
    request = pb.CalibrateRequest(
        request_id="labelled-set",
        examples=[labelled(example) for example in (*TAMPERING, *HONEST, *HONEST_RUNNER)],
        model_use=pb.MODEL_USE_NEVER,
    )
    form = json_format.MessageToDict(request, preserving_proto_field_name=True)
    return json.dumps(form, indent=1, sort_keys=True) + "\n"


def test_the_file_is_current():
    assert PATH.read_text() == text()


def test_messages_carry_the_whole_evidence():
    for example in (*TAMPERING, *HONEST, *HONEST_RUNNER):
        message = labelled(example)
        evidence = evidence_from(message.evidence, "evidence")
        assert evidence.sha256 == example.evidence.sha256, example.name
        assert classes_from(list(message.classes), "classes") == example.labels


if __name__ == "__main__":
    PATH.write_text(text())

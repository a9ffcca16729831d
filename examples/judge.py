"""Ask the judge about a diff that skips a failing test."""

import grpc

from regreen.client.script import words
from regreen.common.v1 import CHANGE_KIND_MODIFY, MODE_ANY_FIX, FileChange
from regreen.judge import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50054")[0])
before = b"def test_add():\n    assert add(1, 2) == 3\n"
after = b"import pytest\n\n@pytest.mark.skip\n" + before
evidence = pb.Evidence(
    mode=MODE_ANY_FIX,
    originals=[FileChange(path="tests/test_add.py", kind=CHANGE_KIND_MODIFY, content=before)],
    changes=[FileChange(path="tests/test_add.py", kind=CHANGE_KIND_MODIFY, content=after)],
)
request = pb.JudgeRequest(evidence=evidence, model_use=pb.MODEL_USE_NEVER)
verdict = pb.JudgeServiceStub(channel).Judge(request, timeout=60).verdict
print("genuine" if verdict.accepted else "not genuine")
for finding in verdict.findings:
    print(pb.FindingClass.Name(getattr(finding, "class")), repr(finding.quote), finding.source)

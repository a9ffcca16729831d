"""Recorded sessions: a branch holds one sequence that the policy was really shown."""

from policy_svc.chat import ChatMl, Message
from policy_svc.engines.base import Completion, FinishReason, VersionSpan
from policy_svc.sessions import Session
from tests.fixtures.policy.model import default_model

CHAT = ChatMl.from_folder(default_model())
HELLO = [Message("user", "hello")]


def said(*ids: int) -> Completion:
    count = len(ids)
    logprobs = tuple(-0.1 * at for at in range(count))
    text = CHAT.tokenizer.decode(ids)
    return Completion(ids, logprobs, (VersionSpan(1, 0, count),), FinishReason.STOP, text)


def test_a_sample_extends_what_its_prompt_was_made_from() -> None:
    session = Session("s")
    first = session.prompt(HELLO, CHAT)
    session.add(first, [said(100, CHAT.end_id)])
    history = [*session.branches[0].messages, Message("user", "more")]
    one, two = session.prompt(history, CHAT), session.prompt(history, CHAT)
    session.add(one, [said(101, CHAT.end_id)])
    session.add(two, [said(102, CHAT.end_id), said(103, CHAT.end_id)])
    assert [branch.parent for branch in session.branches] == [None, 0, 0]
    for branch, token in zip(session.branches, (101, 102, 103), strict=True):
        assert branch.token_ids == [*one.token_ids, token, CHAT.end_id]
        assert [m.role for m in branch.messages] == ["user", "assistant", "user", "assistant"]

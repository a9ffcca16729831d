"""Chats for fine-tuning: what a row holds, and what is nothing to learn from."""

from regreen.dataset import v1 as pb
from regreen.tasks.formats.sft import left_out, messages, row
from tests.integration import dataset_samples as samples


def test_tool_calls_are_calls_and_results_answer_them() -> None:
    trajectory = samples.trajectory("greet")
    trajectory.turns[1].text = 'I look.\n<tool>{"name": "read_file"}</tool>'
    prompt, call, answer, last = messages(trajectory)
    assert prompt == {"role": "user", "content": "repair this"}
    (made,) = call.pop("tool_calls")
    assert call == {"role": "assistant", "content": "I look."}
    assert made["function"] == {"name": "read_file", "arguments": '{"path": "a.py"}'}
    assert (answer["role"], answer["tool_call_id"]) == ("tool", made["id"])
    assert last == {"role": "assistant", "content": "done"}


def test_text_style_keeps_what_was_said() -> None:
    trajectory = samples.trajectory("greet")
    said = messages(trajectory, "text")
    assert [message["role"] for message in said] == ["user", "assistant", "user", "assistant"]
    assert said[1]["content"] == trajectory.turns[1].text


def test_a_call_that_could_not_be_run_stays_text() -> None:
    trajectory = samples.trajectory("greet")
    trajectory.turns[1].ok = False
    said = messages(trajectory)
    assert said[1] == {"role": "assistant", "content": trajectory.turns[1].text}
    assert said[2]["role"] == "user"


def test_token_ids_only_of_exact_rollouts() -> None:
    trajectory = samples.trajectory("greet")
    assert row(trajectory, tokens=True)["loss_mask"] == list(trajectory.loss_mask)
    assert "token_ids" not in row(trajectory)
    trajectory.token_exact = False
    assert "token_ids" not in row(trajectory, tokens=True)


def test_what_is_nothing_to_learn_from_says_why() -> None:
    good = samples.trajectory("greet")
    assert left_out(good) == ""

    def changed(**values: object) -> pb.Trajectory:
        found = pb.Trajectory()
        found.CopyFrom(good)
        for name, value in values.items():
            setattr(found, name, value)
        return found

    hacked = changed()
    hacked.reward.hacks.append("test-deleted")
    assert left_out(hacked) == "flagged as a hack"
    failed = changed()
    failed.reward.solved = False
    assert left_out(failed) == "not solved"
    assert left_out(changed(actor="baseline:newest")) == "a baseline's script"
    silent = changed()
    del silent.turns[1:]
    assert left_out(silent) == "nothing was said"

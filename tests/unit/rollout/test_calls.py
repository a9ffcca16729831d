"""Tool calls in model text: the schema holds, hostile text is harmless."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regreen.rollout.calls import Call, CallError, parse_call
from regreen.rollout.toolset import load_toolset
from regreen.rpc.errors import InvalidArgument

TOOLS = load_toolset()


def test_reads_a_call_with_text_around_it():
    text = 'I pin it.\n<tool>{"name": "dependency_upgrade", "arguments": {"name": "x"}}</tool>'
    assert parse_call(text, TOOLS) == Call(
        "dependency_upgrade", "dependency_upgrade", {"name": "x"}
    )


@pytest.mark.parametrize(
    "text",
    [
        '<tool>{"name": "validate_and_build"}</tool>',
        '<tool>{"name": "validate_and_build", "arguments": {}}',
        '<tool>```json\n{"name": "validate_and_build", "arguments": {}}\n```</tool>',
        '<tool>\n {"arguments": {}, "name": "validate_and_build"} \n</tool> done',
    ],
)
def test_forgives_what_is_safe(text):
    assert parse_call(text, TOOLS).key == "validate_and_build"


def test_takes_raw_line_breaks_in_content():
    text = '<tool>{"name": "write_file", "arguments": {"path": "a.py", "content": "x\ny\t"}}</tool>'
    assert parse_call(text, TOOLS).text("content") == "x\ny\t"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no tool call"),
        ("<tool></tool>", "not valid JSON"),
        ("<tool>[]</tool>", "must be a JSON object"),
        ('<tool>{"name": "nope"}</tool>', "no tool"),
        ('<tool>{"name": 3}</tool>', "no tool"),
        ('<tool>{"name": "read_file"}</tool>', "path is missing"),
        ('<tool>{"name": "read_file", "arguments": {"path": 1}}</tool>', "must be a text"),
        ('<tool>{"name": "read_file", "arguments": {"file": "a"}}</tool>', "no argument"),
        ('<tool>{"name": "read_file", "arguments": {"path": "a", "start": "1"}}</tool>', "whole"),
        ('<tool>{"name": "read_file", "arguments": {"path": "a", "start": true}}</tool>', "whole"),
        ('<tool>{"name": "read_file", "arguments": "a"}</tool>', "must be an object"),
        ('<tool>{"name": "a", "name": "b"}</tool>', "twice"),
        ('<tool>{"name": NaN}</tool>', "not JSON"),
        ('<tool>{"name": "give_up", "why": 1}</tool>', "unknown key"),
        ('<tool>{"name": "run_sh", "arguments": {"cmd": "\\ud800"}}</tool>', "Unicode"),
        ('<tool>{"name": "validate_and_build"}</tool><tool>{}</tool>', "one call per turn"),
        ("<tool>" + "[" * 100_000 + "</tool>", ""),
        ("<tool>" + "9" * 5000 + "</tool>", ""),
        ("<tool>" + "x" * 300_000 + "</tool>", "too long"),
    ],
)
def test_names_the_problem(text, told):
    with pytest.raises(CallError) as failure:
        parse_call(text, TOOLS)
    assert told in str(failure.value)
    assert len(str(failure.value)) < 300


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_call_or_a_call_error(text):
    for wrapped in (text, f"<tool>{text}</tool>", f'<tool>{{"name": {text}}}</tool>'):
        with contextlib.suppress(CallError):
            assert parse_call(wrapped, TOOLS).key


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([t.name for t in TOOLS.tools]), _VALUES)
@settings(max_examples=200, deadline=None)
def test_any_json_is_a_call_of_the_schema_or_a_call_error(name, arguments):
    text = f"<tool>{json.dumps({'name': name, 'arguments': arguments})}</tool>"
    try:
        call = parse_call(text, TOOLS)
    except CallError:
        return
    known = {argument.key for argument in TOOLS.by_key(call.key).arguments}
    assert set(call.arguments) <= known
    call.arguments_json.encode()


@given(st.integers(0, 2**32), st.text(), st.text())
@settings(max_examples=100, deadline=None)
def test_every_variation_reads_its_own_calls(seed, path, content):
    tools = TOOLS.varied(seed)
    assert sorted(t.key for t in tools.tools) == sorted(t.key for t in TOOLS.tools)
    arguments = {"path": path, "content": content}
    if tools.call_open in path + content or tools.call_close in path + content:
        return
    call = parse_call(tools.render_call("write_file", arguments), tools)
    assert (call.key, dict(call.arguments)) == ("write_file", arguments)


def test_variation_depends_on_the_seed_alone():
    assert TOOLS.varied(7) == TOOLS.varied(7)
    names = {tuple(t.name for t in TOOLS.varied(seed).tools) for seed in range(20)}
    assert len(names) > 10


@pytest.mark.parametrize(
    "text",
    [
        "not toml [",
        "",
        'result_formats = ["{text}"]\n[[tool]]\nkey = "a"\n[[tool]]\nkey = "a"\n',
        'result_formats = ["{text}"]\n[[tool]]\nkey = "A-B"\n',
        'result_formats = ["no place"]\n[[tool]]\nkey = "a"\n',
        'result_formats = ["{text}"]\n[[tool]]\nkey = "a"\n[[tool.argument]]\n'
        'key = "x"\ntype = "float"\n',
    ],
)
def test_refuses_malformed_tool_data(text):
    with pytest.raises(InvalidArgument):
        load_toolset(text)

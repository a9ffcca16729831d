"""Requests out of bounds are refused by name; places are bounded and always given back."""

import asyncio
from dataclasses import replace

import pytest

from policy_svc.engines.base import EngineInfo, Request, Sampling, spans
from policy_svc.limits import Admission, Limits, check
from regreen.rpc.errors import InvalidArgument, ResourceExhausted

INFO = EngineInfo("torch", "m", "f32", vocabulary=100, context_length=64, end_of_turn_id=2)
GOOD = Request("r", (1, 2, 3), 1, Sampling(max_new_tokens=8))


def bad(**sampling: object) -> Request:
    return replace(GOOD, sampling=replace(GOOD.sampling, **sampling))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (replace(GOOD, prompt_token_ids=()), "prompt_token_ids"),
        (replace(GOOD, prompt_token_ids=(1, 100)), "prompt_token_ids[1]"),
        (replace(GOOD, prompt_token_ids=(1, -1)), "prompt_token_ids[1]"),
        (replace(GOOD, n=0), "n"),
        (replace(GOOD, n=65), "n"),
        (bad(max_new_tokens=0), "sampling.max_new_tokens"),
        (bad(max_new_tokens=62), "sampling.max_new_tokens"),
        (bad(temperature=-1), "sampling.temperature"),
        (bad(temperature=float("nan")), "sampling.temperature"),
        (bad(top_p=1.5), "sampling.top_p"),
        (bad(top_k=-1), "sampling.top_k"),
        (bad(stop_token_ids=(5, 100)), "sampling.stop_token_ids[1]"),
        (bad(stop=("",)), "sampling.stop[0]"),
        (bad(stop=("x",) * 17), "sampling.stop"),
        (bad(regex="a+"), "sampling.regex"),
        (bad(json_schema="{}"), "sampling.json_schema"),
        (bad(regex="a+", json_schema="{}"), "sampling.json_schema"),
    ],
)
def test_bad_fields_are_named(request_: Request, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(request_, INFO, Limits())
    assert caught.value.field == field


def test_a_broken_expression_is_named() -> None:
    for regex in ("(", "[b-a]", "(" * 900 + "a" + ")" * 900):
        with pytest.raises(InvalidArgument, match=r"sampling\.regex: cannot be followed"):
            check(bad(regex=regex), replace(INFO, structures=True), Limits())


@pytest.mark.parametrize(
    ("regex", "problem"),
    [
        ("a" * 16385, "has 16385 characters"),
        (r"(.{1,500}\n){1,500}", "has 250500 places"),
        ("((a{1,999}){1,999}){1,999}", "has 997002999 places"),
        ("(?:(?=a{200})b|c{99}?){101}", "has 30300 places"),
        ("(x)?(?(1)a{30000}|b)", "has 30002 places"),
        ("(?>a{30000})+", "has 60000 places"),
    ],
)
def test_what_takes_minutes_to_follow_is_refused(regex: str, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        check(bad(regex=regex), replace(INFO, structures=True), Limits())
    small = bad(regex="(?:(?=a)b|c{99}?){3}[^x]*(?P<y>z+)?")
    assert check(small, replace(INFO, structures=True), Limits()).sampling.regex


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ("[]", "it is no JSON object"),
        ('{"maximum": NaN}', "NaN is no number"),
        ('{"a": ' * 2000 + "1" + "}" * 2000, "recursion"),
        ('{"pattern": "(a{1,300}){300}"}', "has 90001 places"),
        ('{"maxItems": 300, "items": {"maxItems": 300, "items": {}}}', "has 180300 places"),
        ('{"anyOf": [{"maxLength": 20001}, {"minProperties": 99999999}]}', "places"),
        ('{"patternProperties": {"a{20001}": {}}}', "has 20003 places"),
        ('{"items": ' * 40 + "{}" + "}" * 40, "nested more than 32 deep"),
        ('{"patternProperties": 5}', "patternProperties is no dict"),
        ('{"items": [1]}', r"\[1\] is no schema"),
        ('{"maxItems": true}', "maxItems is no int"),
        ('{"$ref": "#"}', "refers to nothing but itself"),
        ('{"properties": {"a": {"not": {}}}}', "not is not enforced"),
        ('{"allOf": [{}, {}]}', "allOf of several"),
        ('{"pattern": "a", "minLength": 3}', "pattern beside a length"),
        ('{"required": ["a"]}', 'required names "a"'),
    ],
)
def test_schemas_are_read_and_bounded(schema: str, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem) as caught:
        check(bad(json_schema=schema), replace(INFO, structures=True), Limits())
    assert caught.value.field == "sampling.json_schema"
    small = bad(
        json_schema='{"properties": {"not": {"enum": [{"not": 1}]}, "patternProperties": {}}, '
        '"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"items": {"$ref": "#"}}}}'
    )
    assert check(small, replace(INFO, structures=True), Limits()).sampling.json_schema


@pytest.mark.parametrize(
    ("regex", "problem"),
    [
        (r"\x41b", r"a hex digit follows \\x41"),
        ("a\0b", "NUL is no text"),
        ("[\0-a]", None),
        (r"[^\u0080-\uffff]", "beyond ASCII"),
        ("[^é]", "beyond ASCII"),
        (r"[^\s\S]", "holds a negated one"),
        ("(a|b)$c?", "at the ends alone"),
        ("a$b|c", "at the ends alone"),
        (r"a\b", "at the ends alone"),
    ],
)
def test_what_grammars_read_otherwise_is_refused(regex: str, problem: str | None) -> None:
    if problem is None:
        assert check(bad(regex=regex), replace(INFO, structures=True), Limits())
        return
    with pytest.raises(InvalidArgument, match=problem):
        check(bad(regex=regex), replace(INFO, structures=True), Limits())


@pytest.mark.parametrize("regex", [r"^[^\s]+\.$", r"\x41-\x42", "é|[à-ü]", "", r"\u00e9[^\n]*"])
def test_what_grammars_read_alike_is_taken(regex: str) -> None:
    assert check(bad(regex=regex), replace(INFO, structures=True), Limits()).sampling.regex == regex


def test_zero_top_p_is_off() -> None:
    assert check(bad(top_p=0.0), INFO, Limits()).sampling.top_p == 1.0


async def test_the_queue_is_bounded_and_places_come_back() -> None:
    admission = Admission(Limits(max_running=1, max_waiting=1))
    release = asyncio.Event()

    async def hold() -> None:
        async with admission.place():
            await release.wait()

    first, second = asyncio.create_task(hold()), asyncio.create_task(hold())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (admission.running, admission.waiting) == (1, 1)
    with pytest.raises(ResourceExhausted) as caught:
        async with admission.place():
            pass
    assert caught.value.retry_after_s is not None
    second.cancel()
    release.set()
    await first
    await admission.idle()
    assert (admission.running, admission.waiting) == (0, 0)


def test_spans_join_equal_versions() -> None:
    found = spans([3, 3, 4, 4, 4])
    assert [(s.version, s.start, s.end) for s in found] == [(3, 0, 2), (4, 2, 5)]
    assert spans([]) == ()

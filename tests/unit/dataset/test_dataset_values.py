"""Values of the dataset service survive their trip, whatever they hold."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_svc.arrays import check, pack, stream_of, unpack
from dataset_svc.columns import AnyText, Unsigned64
from dataset_svc.database import normal_url
from dataset_svc.queries.paging import Page, cursor
from dataset_svc.records import RunRecord, TaskQuery
from dataset_svc.translate import run_message, struct_document
from regreen.blobs import compress
from regreen.dataset import v1 as pb
from regreen.rpc.errors import DataLoss, InvalidArgument


@st.composite
def streams(draw):
    """Well-formed token streams."""
    mask = draw(st.lists(st.integers(0, 1), max_size=50))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(mask), max_size=len(mask)))
    values = st.floats(-100, 0, width=32)
    logprobs = [draw(values) if bit else 0.0 for bit in mask]
    versions = [(draw(st.integers(0, 2**62)), n, n + 1) for n, bit in enumerate(mask) if bit]
    return stream_of(ids, bytes(mask), logprobs, versions)


@given(streams())
def test_token_streams_survive_packing_bit_for_bit(stream):
    check(stream, exact=True, prompt_tokens=0)
    blob = pack(stream)
    assert pack(stream) == blob
    again = unpack(blob)
    assert again.token_ids.tobytes() == stream.token_ids.tobytes()
    assert again.loss_mask.tobytes() == stream.loss_mask.tobytes()
    assert again.logprobs.tobytes() == stream.logprobs.tobytes()
    assert again.versions == stream.versions
    assert again.token_ids.dtype == np.int32


@given(st.binary(max_size=200))
def test_anything_else_is_data_loss(content: bytes):
    for blob in (content, compress(content), compress(b"regreen.tokens/1\n" + content)):
        with pytest.raises(DataLoss):
            unpack(blob)


def test_a_stream_without_logprobs_is_only_accepted_as_inexact():
    stream = stream_of([1, 2, 3], b"", [])
    check(stream, exact=False, prompt_tokens=0)
    with pytest.raises(InvalidArgument, match="loss_mask"):
        check(stream, exact=True, prompt_tokens=0)


@given(st.text(alphabet=st.sampled_from("a\0\ufdd0\ufdd1\ufdd2é")))
def test_any_text_survives_a_column_without_nul(text: str):
    column = AnyText()
    stored = column.process_bind_param(text, None)
    assert "\0" not in stored
    assert column.process_result_value(stored, None) == text


@given(st.integers(0, 2**64 - 1))
def test_unsigned_values_survive_a_signed_column(value: int):
    column = Unsigned64()
    stored = column.process_bind_param(value, None)
    assert -(2**63) <= stored < 2**63
    assert column.process_result_value(stored, None) == value


@given(st.text(max_size=60))
def test_a_made_up_page_token_is_refused(token: str):
    if not token:
        return
    with pytest.raises(InvalidArgument) as caught:
        cursor("tasks", TaskQuery(), 10, token, (str,))
    assert caught.value.field == "page_token"


def test_a_page_token_goes_on_after_the_last_row():
    start = cursor("tasks", TaskQuery(split="train"), 2, "", (str,))
    page = start.page(["a", "b", "c"], [["a"], ["b"], ["c"]])
    assert page.rows == ["a", "b"]
    assert cursor("tasks", TaskQuery(split="train"), 2, page.next_token, (str,)).after == ["b"]
    with pytest.raises(InvalidArgument):
        cursor("tasks", TaskQuery(split="test"), 2, page.next_token, (str,))
    cut = start.cut(Page(["a", "b"], "next", [["a"], ["b"]]), [10, 10], 15)
    assert cut.rows == ["a"]
    assert cursor("tasks", TaskQuery(split="train"), 2, cut.next_token, (str,)).after == ["a"]
    assert start.cut(Page(["a", "b"], "next", [["a"], ["b"]]), [10, 5], 15).next_token == "next"


@pytest.mark.parametrize("url", ["mysql://x", "not a url", ""])
def test_only_postgres_urls_are_taken(url: str):
    with pytest.raises(InvalidArgument):
        normal_url(url)


def test_urls_get_our_driver_and_keep_their_password():
    assert normal_url("postgres://u:p@h/d") == "postgresql+psycopg://u:p@h/d"


def test_a_document_is_stored_only_if_it_can_be_read_again():
    def nested(levels: int) -> pb.CreateRunRequest:
        value: dict[str, Any] = {"a": [1.0]}
        for _ in range(levels - 2):
            value = {"a": value}
        request = pb.CreateRunRequest()
        request.config.update(value)
        return request

    deepest = struct_document(nested(24), "config")
    run = run_message(RunRecord("run_1", "r", "sft", "active", 1, deepest or {}, {}))
    again = pb.CreateRunResponse(run=run).SerializeToString()
    assert pb.CreateRunResponse.FromString(again).run.config == nested(24).config
    with pytest.raises(InvalidArgument, match="config: is over 24 levels deep; flatten it"):
        struct_document(nested(25), "config")
    assert struct_document(pb.CreateRunRequest(), "config") is None

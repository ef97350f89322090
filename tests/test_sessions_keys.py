"""Session key strategies [C29]: where a key is found, and that a bad one is never silently unordered."""

import json
import re

import pytest
from hypothesis import given, strategies as st

from queue_runtime.client import QueueClient
from queue_runtime.errors import ConfigurationError, ValidationError
from queue_runtime.message import Message
from queue_runtime.sessions import CompositeKey, FallbackKey, FieldKey, NoKey, SessionKey, session_id_of, with_session

EVENT = {
    "repository": {"full_name": "a/b", "id": 17, "flags": {"private": True}},
    "pull_request.number": "dotted",
    "number": 9,
    "zero": 0,
    "empty": "",
    "none": None,
    "list": [1],
    "float": 1.5,
    "true": True,
}


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (FieldKey("number"), "9"),
        (FieldKey("zero"), "0"),
        (FieldKey("number", prefix="pr-"), "pr-9"),
        (FieldKey("repository.full_name"), "a/b"),
        (FieldKey("repository.id"), "17"),
        (FieldKey("pull_request.number"), "dotted"),
        (FieldKey("missing"), None),
        (FieldKey("missing.deeper"), None),
        (FieldKey("number.deeper"), None),
        (FieldKey("repository.full_name.deeper"), None),
        (FieldKey("empty"), None),
        (FieldKey("none", prefix="p"), None),
        (CompositeKey("repository.full_name", "number"), "a/b:9"),
        (CompositeKey("number"), "9"),
        (CompositeKey("repository.full_name", "number", separator="#", prefix="r/"), "r/a/b#9"),
        (CompositeKey("repository.full_name", "missing"), None),
        (CompositeKey("empty", "number"), None),
        (FallbackKey(FieldKey("missing"), FieldKey("number"), FieldKey("zero")), "9"),
        (FallbackKey(CompositeKey("number", "missing"), FieldKey("zero", prefix="z")), "z0"),
        (FallbackKey(FieldKey("missing"), NoKey()), None),
        (FallbackKey(FallbackKey(NoKey()), FieldKey("number")), "9"),
        (NoKey(), None),
    ],
    ids=repr,
)
def test_strategies(strategy: SessionKey, expected: str | None) -> None:
    assert session_id_of(strategy, EVENT) == expected


@pytest.mark.parametrize("field", ["list", "float", "true", "repository", "repository.flags.private"])
def test_a_key_is_made_of_texts_and_whole_numbers(field: str) -> None:
    """Named by its field."""
    for strategy in (FieldKey(field), CompositeKey("number", field), FallbackKey(FieldKey(field))):
        with pytest.raises(ValidationError, match="texts and whole numbers") as caught:
            session_id_of(strategy, EVENT)
        assert caught.value.field == field


@pytest.mark.parametrize("key", ["é", "a\nb", "\x7f", "x" * 129, "日本"])
def test_a_key_that_is_no_session_id_is_an_error(key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        session_id_of(FieldKey("k"), {"k": key})
    assert caught.value.field == "session_id"
    with pytest.raises(ValidationError):
        session_id_of(FieldKey("k", prefix="x" * 120), {"k": "y" * 9})


@pytest.mark.parametrize(
    "make",
    [
        lambda: FieldKey(""),
        lambda: FieldKey(None),  # type: ignore[arg-type]
        lambda: FieldKey(3),  # type: ignore[arg-type]
        lambda: CompositeKey(),
        lambda: CompositeKey("a", ""),
        lambda: FallbackKey(),
    ],
)
def test_a_strategy_is_checked_when_it_is_made(make: object) -> None:
    """[C33]"""
    with pytest.raises(ConfigurationError, match=r"^(field|fields|strategies): "):
        make()  # type: ignore[operator]


def test_strategies_show_what_they_are() -> None:
    assert repr(FallbackKey(FieldKey("a", prefix="p"), NoKey())) == "FallbackKey(FieldKey('a', prefix='p'), NoKey())"
    assert repr(CompositeKey("a", "b")) == "CompositeKey('a', 'b', separator=':', prefix='')"


def test_the_source_is_the_attributes_or_the_body() -> None:
    strategy = FieldKey("repository.full_name")
    message = Message(body=json.dumps(EVENT).encode(), attributes={"repository.full_name": "from/attributes"})
    assert with_session(strategy, message, "attributes").session_id == "from/attributes"
    assert with_session(strategy, message, "body").session_id == "a/b"
    changed = with_session(strategy, message, "body")
    assert changed == message.replace(session_id="a/b")
    assert with_session(NoKey(), message, "body") is message


def test_a_given_session_stays() -> None:
    """And then the body is not even read."""
    message = Message(body=b"no JSON", session_id="mine")
    assert with_session(FieldKey("number"), message, "body") is message


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[]", b"1", b"null", b'"text"'])
def test_a_body_that_is_no_json_object_is_an_error(body: bytes) -> None:
    with pytest.raises(ValidationError, match=r"body: .*JSON") as caught:
        with_session(FieldKey("number"), Message(body=body), "body")
    assert caught.value.field == "body"


def test_a_body_that_nests_too_deep_is_an_error() -> None:
    """A hostile body raises no RecursionError."""
    with pytest.raises(ValidationError, match="body"):
        with_session(FieldKey("number"), Message(body=b"[" * 100_000), "body")


@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=8), max_size=4))
def test_any_composite_is_all_or_nothing(fields: dict[str, object]) -> None:
    """A part's absence never yields a shorter key, which would mix sessions up."""
    names = [name for name in fields if name] or ["x"]
    strategy = CompositeKey(*names, separator="|")
    whole = all(fields.get(name) not in (None, "") for name in names)
    expected = "|".join(str(fields[name]) for name in names) if whole else None
    if expected is None or re.fullmatch("[ -~]{1,128}", expected):
        assert session_id_of(strategy, fields) == expected
    else:
        with pytest.raises(ValidationError, match="session_id"):
            session_id_of(strategy, fields)


async def test_the_client_looks_into_the_body_when_told_to() -> None:
    async with QueueClient(session_key=FieldKey("number"), session_key_source="body") as client:
        await client.send_messages("q", [Message(body=b'{"number": 5}'), Message(body=b"{}")])
        with pytest.raises(ValidationError, match="body"):
            await client.send_message("q", Message(body=b"no JSON"))
        session = await client.accept_session("q", None, 0)
        assert session is not None
        assert session.session_id == "5"
        plain = await client.receive_message("q", 0)
        assert plain is not None
        assert plain.body == b"{}"


async def test_a_bad_source_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="session_key_source"):
        QueueClient(session_key=NoKey(), session_key_source="headers")  # type: ignore[arg-type]

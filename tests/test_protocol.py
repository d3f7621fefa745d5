"""The API's bodies, errors and metrics."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from support.engines import ScriptedAsyncEngine, generation_result

from pipeline.errors import GattError
from pipeline.inference.logits import TokenLogprob
from pipeline.inference.request import EngineClosedError, Prompt, QueueFullError, TextPiece
from pipeline.records import DEFAULT_SAMPLER, Request
from pipeline.server.errors import ApiError, from_engine, from_validation
from pipeline.server.metrics import Metrics
from pipeline.server.protocol import ChatBody, TextBody
from pipeline.server.responses import Answer, ResponseBuilder, TextResponseBuilder


def _chat_body(**fields: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi."}], **fields}


def test_a_chat_completion_has_the_fields_of_openai() -> None:
    body = ResponseBuilder("m").completion([Answer(TextPiece("Hi."), generation_result())])
    assert str(body.pop("id")).startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def test_the_chunks_of_a_chat_have_deltas_and_one_id() -> None:
    builder, result = ResponseBuilder("m"), generation_result("length")
    chunks: list[Any] = [
        builder.role_chunk(0),
        builder.piece_chunk(0, TextPiece("Hi.")),
        builder.final_chunk(0, result),
        builder.usage_chunk([result]),
    ]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in (
            ({"role": "assistant", "content": ""}, None),
            ({"content": "Hi."}, None),
            ({}, "length"),
        )
    ] + [[]]
    assert [chunk.get("usage", {}).get("total_tokens") for chunk in chunks] == [None] * 3 + [8]


def test_text_completions_have_texts() -> None:
    builder, result = TextResponseBuilder("m"), generation_result()
    assert builder.role_chunk(0) is None
    bodies: list[Any] = [
        builder.piece_chunk(0, TextPiece("Hi.")),
        builder.final_chunk(0, result),
        builder.completion([Answer(TextPiece("Hi."), result)]),
        builder.usage_chunk([result]),
    ]
    assert {body["object"] for body in bodies} == {"text_completion"}
    assert [body["choices"] for body in bodies] == [
        [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]
        for text, reason in (("Hi.", None), ("", "stop"), ("Hi.", "stop"))
    ] + [[]]
    assert [("usage" in body) for body in bodies] == [False, False, True, True]


def test_offsets_in_a_streamed_text_count_from_the_beginning_of_each_choice() -> None:
    entries = [TokenLogprob(token, -0.5, ()) for token in (b"Hi", b" there", b".")]
    builder = TextResponseBuilder("m", logprobs=True)
    pieces = [(0, entries[:2]), (1, entries[:1]), (0, entries[2:]), (1, entries[1:])]
    offsets: dict[int, list[int]] = {0: [], 1: []}
    for index, part in pieces:
        chunk: Any = builder.piece_chunk(index, TextPiece("", logprobs=tuple(part)))
        offsets[index] += chunk["choices"][0]["logprobs"]["text_offset"]
    piece = TextPiece("Hi there.", logprobs=tuple(entries))
    body: Any = TextResponseBuilder("m", logprobs=True).completion(
        [Answer(piece, generation_result())] * 2
    )
    unstreamed = [choice["logprobs"]["text_offset"] for choice in body["choices"]]
    assert [offsets[0], offsets[1]] == unstreamed == [[0, 2, 8]] * 2


def _sampling(**fields: object) -> Request:
    """Return what the engine is asked for, in a context of 40 tokens besides the prompt."""
    body = ChatBody.model_validate(_chat_body(**fields))
    body.check()
    return body.generation(Prompt([0] * 2), (), 42).sampling


def test_a_request_has_defaults_and_the_rest_of_the_context() -> None:
    request = _sampling()
    assert (request.max_tokens, request.temperature, request.top_p) == (40, 0.7, 1.0)
    assert request.sampler == DEFAULT_SAMPLER
    assert _sampling().seed != request.seed  # random
    fields: dict[str, Any] = {"max_tokens": 9, "temperature": 0, "top_p": 0.5, "seed": 7}
    request = _sampling(**fields)
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (9, 0, 0.5, 7)
    body = ChatBody.model_validate(_chat_body(stop="x"))
    assert (body.stops, body.include_usage) == (("x",), False)
    assert _sampling(max_tokens=9, max_completion_tokens=5).max_tokens == 5


def test_thoughts_may_fill_the_context_unless_a_limit_includes_them() -> None:
    assert _sampling(max_tokens=9).max_thought_tokens == 31
    assert _sampling(max_completion_tokens=9).max_thought_tokens == 0
    assert _sampling().max_thought_tokens == 0  # they share what is left


def test_messages_in_parts_and_of_developers_become_plain() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    body = ChatBody.model_validate(_chat_body(messages=messages))
    assert [message.to_message() for message in body.messages] == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "a\nb"},
    ]
    assert TextBody.model_validate({"model": "m", "prompt": ["a"]}).prompt == "a"
    with pytest.raises(ValidationError):
        TextBody.model_validate({"model": "m", "prompt": ["a", "b"]})


@pytest.mark.parametrize(
    "fields", [{"n": 1}, {"tools": []}, {"user": "me"}, {"logit_bias": {}}, {"audio": None}]
)
def test_fields_that_change_nothing_are_accepted(fields: dict[str, object]) -> None:
    ChatBody.model_validate(_chat_body(**fields)).check()


@pytest.mark.parametrize(
    ("fields", "param", "hint"),
    [
        ({"best_of": 2}, "best_of", "Only 1 is."),
        ({"tool_choice": "required"}, "tool_choice", 'Only "none" or "auto" is.'),
        ({"audio": {}}, "audio", "Omit it."),
        ({"stream_options": {"include_usage": True}}, "stream_options", "requires 'stream'"),
    ],
)
def test_fields_that_are_not_supported(fields: dict[str, object], param: str, hint: str) -> None:
    with pytest.raises(ApiError, match=hint) as caught:
        ChatBody.model_validate(_chat_body(**fields)).check()
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFullError("full"), 429, "server_busy"),
        (EngineClosedError(), 503, "server_stopping"),
        (GattError("refused"), 400, "invalid_prompt"),
        (KeyError("secret"), 500, "internal_error"),
    ],
)
def test_errors_of_the_engine_have_a_status(error: Exception, status: int, code: str) -> None:
    api_error = from_engine(error, "messages")
    assert (api_error.status, api_error.code) == (status, code)
    assert "secret" not in api_error.message


@pytest.mark.parametrize(
    ("detail", "message", "param"),
    [
        ({"type": "json_invalid", "loc": ("body", 7)}, "not valid JSON (at character 7)", None),
        ({"type": "model_type", "loc": ("body",)}, "not a JSON object", None),
        ({"type": "missing", "loc": ("body", "model")}, "parameter: 'model'", "model"),
        (
            {"type": "int_type", "loc": ("body", "messages", 0), "msg": "x", "input": "secret"},
            "Invalid value for 'messages.0': expected an integer.",
            "messages.0",
        ),
    ],
)
def test_invalid_bodies_are_explained(
    detail: dict[str, object], message: str, param: str | None
) -> None:
    error = from_validation(RequestValidationError([detail], body={"messages": ["secret"]}))
    assert message in error.message
    assert (error.status, error.param) == (400, param)
    assert "secret" not in error.message


def test_metrics_count_requests_tokens_and_seconds() -> None:
    metrics = Metrics(ScriptedAsyncEngine(names=("m", "idle")))
    metrics.count_request("m", 200)
    metrics.count_request("", 404)
    for _ in range(2):
        metrics.count_result("m", generation_result())
    lines = metrics.render().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    expected = {
        'gatt_requests_total{model="m",status="200"}': 1,
        'gatt_requests_total{model="",status="404"}': 1,
        'gatt_prompt_tokens_total{model="m"}': 10,
        'gatt_cached_tokens_total{model="m"}': 4,
        'gatt_generated_tokens_total{model="m"}': 6,
        'gatt_generated_tokens_total{model="idle"}': 0,
        'gatt_first_token_seconds_bucket{le="0.1",model="m"}': 0,
        'gatt_first_token_seconds_bucket{le="0.25",model="m"}': 2,
        'gatt_first_token_seconds_bucket{le="+Inf",model="m"}': 2,
        'gatt_first_token_seconds_sum{model="m"}': 0.4,
        'gatt_sequences{model="m"}': 4,
        'gatt_sequences_in_use{model="m"}': 1,
        'gatt_queue{model="m"}': 2,
    }
    assert {name: float(values[name]) for name in expected} == expected
    assert not [name for name in values if "_created" in name]
    assert "# TYPE gatt_first_token_seconds histogram" in lines

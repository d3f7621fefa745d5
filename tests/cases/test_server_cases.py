"""Fields of requests that change the answer are honored, or refused by name; so are thoughts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from support.scripted_model import PLAIN_TEMPLATE, write_scripted_gguf

from pipeline.inference.async_engine import AsyncEngine, ModelSource
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.logits import log_softmax
from pipeline.inference.scheduler import Limits
from pipeline.records import Message
from pipeline.server.app import make_app
from pipeline.server.middleware import AccessSettings

CONTEXT = 512
_ROUNDING = 0.04
"""By which cached prefixes and batches change the probabilities of an 8-bit model."""
QUESTION = "Is the sky blue? Answer yes or no."
MESSAGES: list[Message] = [{"role": "user", "content": QUESTION}]


class Api:
    """A client of an application over `engine`, without a network."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.client = TestClient(make_app(engine, AccessSettings()))

    def post(self, path: str = "/v1/chat/completions", **fields: Any) -> Any:
        """Return the response to a request, a greedy one for 16 tokens by default."""
        defaults: dict[str, object] = {
            "model": self.engine.names[0],
            "temperature": 0,
            "max_tokens": 16,
            "seed": 1,
        }
        prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "The sky is"}
        return self.client.post(path, json={**defaults, **prompt, **fields})

    def chat(self, **fields: Any) -> Any:
        """Return the body of a response."""
        response = self.post(**fields)
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, **fields: Any) -> str:
        """Return the only answer."""
        return str(self.chat(**fields)["choices"][0]["message"]["content"])

    def refusal(self, **fields: Any) -> dict[str, str]:
        """Return the error of a request that is refused."""
        response = self.post(**fields)
        assert response.status_code == 400, response.text
        error: dict[str, str] = response.json()["error"]
        return error

    def events(self, **fields: Any) -> list[Any]:
        """Return the events of a streamed response."""
        text = self.post(stream=True, **fields).text
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]


@pytest.fixture(scope="module")
def api(base: Path) -> Iterator[Api]:
    engine = AsyncEngine({"m": ModelSource(base)}, Limits(CONTEXT, max_sequences=4))
    yield Api(engine)
    engine.close()


@pytest.fixture(scope="module")
def exact(base: Path) -> Iterator[BatchEngine]:
    with BatchEngine(base, 1, CONTEXT) as engine:
        yield engine


# --- sampling


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0}])
def test_a_sampler_that_leaves_one_token_is_greedy(api: Api, fields: dict[str, float]) -> None:
    hot = {"temperature": 2.0, "max_tokens": 8, "seed": 5}
    greedy = api.text(max_tokens=8)
    assert api.text(**hot) != greedy
    assert api.text(**hot, **fields) == greedy


def test_more_candidates_are_drawn_from_if_none_are_cut(api: Api) -> None:
    cold = api.text(temperature=2.0, seed=3)
    assert api.text(temperature=2.0, seed=3, top_k=0, min_p=0.0) != cold
    assert api.text(temperature=2.0, seed=3, top_k=40, min_p=0.05) == cold  # the defaults
    typical = {"temperature": 2.0, "seed": 3, "top_k": 0, "typical_p": 0.3}
    assert api.text(**typical) == api.text(**typical) != cold


def test_penalties_avoid_what_was_said(api: Api) -> None:
    request: dict[str, object] = {
        "messages": [{"role": "user", "content": "Write the word cat ten times."}],
        "max_tokens": 24,
        "logit_bias": {str(_token(api, " cat")): 4},
    }
    plain = api.text(**request).count("cat")
    assert plain > 6
    for fields in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repeat_penalty": 2.0}):
        assert api.text(**request, **fields).count("cat") < plain, fields
    assert api.text(**request, repeat_penalty=1.0, presence_penalty=0).count("cat") == plain
    # The prompt counts for the repetition penalty of vLLM and Hugging Face, whatever its length.
    assert api.text(repetition_penalty=1.7) == api.text(repeat_penalty=1.7, repeat_last_n=-1)


def test_a_bias_bans_a_token_or_forces_it(api: Api) -> None:
    greedy = api.text()
    first = _token(api, greedy.split()[0][:2])
    assert not api.text(logit_bias={str(first): -100}).startswith(greedy[:2])
    forced = _token(api, " cat")
    assert api.text(logit_bias={str(forced): 100}, max_tokens=3) == " cat cat cat"
    assert "does not exist" in api.refusal(logit_bias={"4000000": 1})["message"]
    assert api.refusal(logit_bias={"cat": 1})["param"] == "logit_bias"


def test_ignore_eos_goes_on_to_the_maximum(api: Api) -> None:
    ended = api.chat()
    assert ended["choices"][0]["finish_reason"] == "stop"
    longer = api.chat(ignore_eos=True)
    assert longer["choices"][0]["finish_reason"] == "length"
    assert longer["usage"]["completion_tokens"] == 16
    assert _text(longer).startswith(_text(ended))


def test_other_answers_are_unchanged_by_sampling_fields_of_one(api: Api) -> None:
    plain = api.text(temperature=0.9, seed=7)
    for fields in ({"logprobs": True}, {"n": 1}, {"user": "me"}, {"presence_penalty": 0}):
        assert api.text(temperature=0.9, seed=7, **fields) == plain


# --- log-probabilities and several choices


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.5, "logit_bias": {"300": 9}}])
def test_log_probabilities_are_those_of_the_model(
    api: Api, exact: BatchEngine, fields: dict[str, object]
) -> None:
    body = api.chat(logprobs=True, top_logprobs=3, max_tokens=5, **fields)
    entries = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == _text(body)
    tokens = exact.tokenize(exact.template.render(MESSAGES))
    for entry in entries:
        *_, row = exact.logits(tokens)
        expected = log_softmax(row)
        token = _token(api, entry["token"])
        logprobs = [entry["logprob"], *(top["logprob"] for top in entry["top_logprobs"])]
        likely = [expected[token], *np.sort(expected)[::-1][:3]]
        assert np.allclose(np.exp(logprobs), np.exp(likely), atol=_ROUNDING)
        assert bytes(entry["bytes"]).decode() == entry["token"]
        tokens.append(token)


def test_streams_and_text_completions_have_log_probabilities(api: Api) -> None:
    expected = api.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    chunks = [event["choices"][0] for event in api.events(logprobs=True)]
    streamed = [entry for c in chunks if c["logprobs"] for entry in c["logprobs"]["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in expected]
    body = api.post("/v1/completions", logprobs=2).json()["choices"][0]
    assert "".join(body["logprobs"]["tokens"]) == body["text"]
    assert [len(top) for top in body["logprobs"]["top_logprobs"]] == [2] * 16
    assert body["logprobs"]["text_offset"][1] == len(body["logprobs"]["tokens"][0])
    events = api.events(path="/v1/completions", logprobs=2)
    parts = [event["choices"][0]["logprobs"] for event in events]
    for name in ("tokens", "text_offset"):
        assert [value for part in parts for value in part[name]] == body["logprobs"][name]


def test_the_largest_seed_is_one_and_minus_one_is_none(api: Api) -> None:
    request = {"temperature": 2.0, "max_tokens": 8}
    assert len({api.text(seed=2**32 - 1, **request) for _ in range(3)}) == 1
    assert len({api.text(seed=-1, **request) for _ in range(3)}) > 1


def test_n_choices_have_seeds_of_their_own_and_one_prompt(api: Api) -> None:
    request: dict[str, object] = {"temperature": 1.5, "max_tokens": 12}
    body = api.chat(n=3, **request)
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert texts == [api.text(seed=seed, **request) for seed in (1, 2, 3)]
    assert len(set(texts)) > 1
    one = api.chat(**request)["usage"]
    assert body["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert body["usage"]["completion_tokens"] > one["completion_tokens"]
    events = api.events(n=3, stream_options={"include_usage": True}, **request)
    streamed = ["", "", ""]
    for choice in (choice for event in events for choice in event["choices"]):
        streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts
    assert events[-1]["usage"]["completion_tokens"] == body["usage"]["completion_tokens"]
    reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert len(reasons) == 3
    texts = [c["text"] for c in api.post("/v1/completions", n=2, **request).json()["choices"]]
    assert len(set(texts)) == 2


# --- grammars and schemas


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": 'root ::= "perhaps" | "never"'},
        {"guided_grammar": 'root ::= "perhaps" | "never"'},
        {"guided_choice": ["perhaps", "never"]},
    ],
)
def test_a_grammar_restricts_the_answer(
    api: Api, fields: dict[str, object], temperature: float
) -> None:
    body = api.chat(temperature=temperature, **fields)
    assert _text(body) in ("perhaps", "never")
    assert body["choices"][0]["finish_reason"] == "stop"
    assert "".join(
        event["choices"][0]["delta"].get("content") or ""
        for event in api.events(temperature=temperature, **fields)
    ) == _text(body)


SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ['da"rk\\', "green"]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
        "note": {"type": ["string", "null"], "maxLength": 3},
    },
    "required": ["color", "sizes", "note"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_a_schema_restricts_the_answer(api: Api, fields: dict[str, object]) -> None:
    value = json.loads(api.text(temperature=1.0, max_tokens=80, **fields))
    assert list(value) == ["color", "sizes", "note"]
    assert value["color"] in ('da"rk\\', "green")
    assert 1 <= len(value["sizes"]) <= 2 and all(isinstance(n, int) for n in value["sizes"])
    assert value["note"] is None or len(value["note"]) <= 3


def test_definitions_patterns_and_nullable_enumerations_restrict_the_answer(api: Api) -> None:
    node = {
        "type": "object",
        "properties": {
            "unit": {"type": ["string", "null"], "enum": ["C", "F", None]},
            "code": {"type": "string", "pattern": r"^[^,]{2}-\d{3}$"},
            "next": {"anyOf": [{"$ref": "#/$defs/list_node"}, {"type": "null"}]},
        },
        "required": ["unit", "code", "next"],
    }
    schema = {"$ref": "#/$defs/list_node", "$defs": {"list_node": node}}
    for seed in range(20):
        text = api.text(json_schema=schema, temperature=2.0, max_tokens=200, seed=seed)
        with suppress(json.JSONDecodeError):  # a chain that was cut
            value = json.loads(text)
            assert value["unit"] in ("C", "F", None)
            assert re.fullmatch(r"[^,]{2}-\d{3}", value["code"])
            return
    raise AssertionError(text)


def test_a_json_object_begins_as_one(api: Api) -> None:
    text = api.text(response_format={"type": "json_object"}, temperature=1.0)
    assert text.startswith("{")
    assert api.text(response_format={"type": "text"}) == api.text()


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"grammar": 'root ::= "'}, "grammar", "grammar is not valid"),
        ({"grammar": 'root ::= root "x"'}, None, "left recursion"),
        ({"grammar": "root ::= " + "(" * 9000 + '"x"' + ")" * 9000}, None, "too large"),
        ({"grammar": 'root ::= "a"\n' + "# x\n" * 30_000}, None, "too large"),
        ({"json_schema": {"type": "integer", "minimum": 3}}, "json_schema", "'minimum'"),
        ({"json_schema": {"type": "object", "required": ["a"]}}, "json_schema", "'a'"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema", "nowhere"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "grammar", "Only one of"),
        ({"grammar": 'root ::= "a"', "ignore_eos": True}, "ignore_eos", "grammar"),
    ],
)
def test_what_no_answer_could_follow_is_refused(
    api: Api, fields: dict[str, object], param: str | None, problem: str
) -> None:
    error = api.refusal(**fields)
    assert problem in error["message"]
    assert param is None or error["param"] == param
    assert api.text(max_tokens=1)  # the server goes on


# --- names


@pytest.mark.parametrize(
    "name",
    ["mirostat", "xtc_probability", "guided_regex", "top_kk", "n_predict", "min_tokens", "foo"],
)
def test_an_unknown_field_is_refused_by_name(api: Api, name: str) -> None:
    error = api.refusal(**{name: 1})
    assert (error["param"], error["code"]) == (name, "unknown_parameter")
    assert name in error["message"]


def test_a_near_name_is_suggested(api: Api) -> None:
    assert "Did you mean 'top_k'?" in api.refusal(topk=3)["message"]
    response = api.post("/v1/completions", messages=[])
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "x", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"parallel_tool_calls": True, "tools": [], "tool_choice": "none"},
        {"stream_options": None, "logit_bias": None, "grammar": "", "seed": None},
    ],
)
def test_harmless_fields_change_nothing(api: Api, fields: dict[str, object]) -> None:
    assert api.text(**fields) == api.text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": "3"}, "Invalid value for 'top_k': expected an integer."),
        ({"min_p": 2}, "Invalid value for 'min_p': expected a number of at most 1.0."),
        ({"stop": 3}, "Invalid value for 'stop': expected a string or a list."),
        ({"stop": [3]}, "Invalid value for 'stop.0': expected a string."),
        ({"stream_options": {"x": 1}}, "Unknown parameter: 'stream_options.x'. Omit it."),
        ({"messages": "Hi"}, "Invalid value for 'messages': expected a list."),
        (
            {"messages": [{"role": "user", "content": None}]},
            "Invalid value for 'messages.0.content': expected a string or a list.",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "Invalid value for 'messages.0.role': expected 'system', 'developer', 'user' or "
            "'assistant'.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "Missing required parameter: 'messages.0.content.0.text'.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "Invalid value for 'messages.0.content.0.type': expected 'text'.",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "'tool_calls' of a message is not supported here. Omit it.",
        ),
    ],
)
def test_messages_are_in_the_words_of_the_request(
    api: Api, fields: dict[str, object], message: str
) -> None:
    assert api.refusal(**fields)["message"] == message


def test_the_last_message_is_continued(api: Api, exact: BatchEngine) -> None:
    messages: list[Message] = [*MESSAGES, {"role": "assistant", "content": "No. The sky is"}]
    body = api.chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    rendered = exact.template.render(messages, add_generation_prompt=False)
    prompt = rendered[: rendered.rindex("The sky is") + len("The sky is")]
    assert body["usage"]["prompt_tokens"] == len(exact.tokenize(prompt))
    assert _text(body).startswith(" ")
    assert api.refusal(continue_final_message=True)["param"] == "continue_final_message"
    assert api.refusal(add_generation_prompt=False)["param"] == "add_generation_prompt"


# --- thoughts

THINKING = ["<think>", "Hmm", ", ", "well", "</think>", "Yes", "!"]
SWITCH = (
    "{{ messages[-1].content }}<|begin|>"
    "{% if enable_thinking is defined and enable_thinking %}<think>{% else %}</think>{% endif %}"
)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Serve models that think: by themselves, because the prompt begins it, or if asked to."""
    templates = {
        "own": PLAIN_TEMPLATE,
        "opened": PLAIN_TEMPLATE + "<think>",
        "switch": SWITCH,
        "broken": "{{ messages[0].content.nothing() }}<|begin|>",
    }
    files = {
        name: write_scripted_gguf(tmp_path_factory.mktemp(name), THINKING, template, name)
        for name, template in templates.items()
    }
    endless = write_scripted_gguf(
        tmp_path_factory.mktemp("endless"),
        ["<think>", "Hmm", ", ", "so"],
        PLAIN_TEMPLATE,
        "endless",
    )
    sources = {name: ModelSource(file) for name, file in {**files, "endless": endless}.items()}
    engine = AsyncEngine(sources, Limits(128, max_sequences=2))
    yield Api(engine)
    engine.close()


@pytest.mark.parametrize("model", ["own", "opened"])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_thoughts_are_not_the_answer_and_do_not_spend_its_tokens(
    thinking: Api, model: str, temperature: float
) -> None:
    request = {"model": model, "temperature": temperature, "max_tokens": 2}
    body = thinking.chat(**request)
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "Yes!"
    assert choice["message"]["reasoning_content"] == "Hmm, well"
    tokens = 5 if model == "own" else 4
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": tokens}
    assert body["usage"]["completion_tokens"] == tokens + 2
    assert choice["finish_reason"] == "length"
    assert thinking.chat(**{**request, "max_tokens": 3})["choices"][0]["finish_reason"] == "stop"
    deltas = [event["choices"][0]["delta"] for event in thinking.events(**request)]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes!"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hmm, well"
    assert _text(thinking.chat(**{**request, "stop": "well"})) == "Yes!"


def test_an_answer_that_ends_within_a_thought_is_unfinished(thinking: Api) -> None:
    for fields in ({"model": "endless"}, {"model": "own", "max_completion_tokens": 3}):
        (choice,) = thinking.chat(**fields)["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == ""
        assert choice["message"]["reasoning_content"].startswith("Hmm")


def test_a_thought_in_the_last_message_is_continued_as_a_thought(thinking: Api) -> None:
    begun: Message = {"role": "assistant", "content": "<think>Hmm"}
    for model in ("own", "opened"):
        body = thinking.chat(
            model=model, messages=[*MESSAGES, begun], continue_final_message=True, max_tokens=2
        )
        (choice,) = body["choices"]
        assert choice["message"]["reasoning_content"] == ", well"
        assert choice["message"]["content"] == "Yes!"


def test_thoughts_do_not_go_back_into_the_chat(thinking: Api) -> None:
    def prompt_tokens(answer: dict[str, str]) -> int:
        messages = [*MESSAGES, {"role": "assistant", **answer}, *MESSAGES]
        return int(thinking.chat(model="own", messages=messages)["usage"]["prompt_tokens"])

    plain = prompt_tokens({"content": "Yes!"})
    assert prompt_tokens({"content": "<think>Hmm</think>Yes!"}) == plain
    assert prompt_tokens({"content": "Yes!", "reasoning_content": "Hmm"}) == plain
    assert prompt_tokens({"content": "HmmYes!"}) > plain


def test_variables_of_the_chat_template_are_set_or_refused(thinking: Api) -> None:
    request: dict[str, object] = {"model": "switch"}
    (plain,) = thinking.chat(**request)["choices"]
    assert plain["message"] == {"role": "assistant", "content": "Yes!", "refusal": None}
    on = thinking.chat(**request, chat_template_kwargs={"enable_thinking": True})
    assert on["choices"][0]["message"]["reasoning_content"] == "Hmm, well"
    unknown: list[dict[str, object]] = [
        {"chat_template_kwargs": {"enable_thinkin": True}},
        {"chat_template_kwargs": {"messages": []}},
        {"reasoning_effort": "high"},
    ]
    for fields in unknown:
        error = thinking.refusal(**request, **fields)
        assert "it has enable_thinking" in error["message"]
        assert error["param"] == next(iter(fields))
    assert (
        "has no variable"
        in thinking.refusal(model="own", chat_template_kwargs={"enable_thinking": False})["message"]
    )


def test_a_chat_template_that_fails_is_an_error_of_one_line(thinking: Api) -> None:
    error = thinking.refusal(model="broken")
    assert "chat template" in error["message"]
    assert "\n" not in error["message"]
    assert error["param"] == "messages"


# ---


def _text(body: Any) -> str:
    return str(body["choices"][0]["message"]["content"])


def _token(api: Api, text: str) -> int:
    """Return the only token of a text."""
    (token,) = api.engine._models[api.engine.names[0]].loaded.tokenize(text)
    return token

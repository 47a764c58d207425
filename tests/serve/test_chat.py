"""Which language a chat asks for, and bodies made to cost the server much."""

import base64
import json
import time
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

from serve.asked import MOST_SEARCHED, asked_language
from serve.chat import MOST_MARKS, read_chat
from serve.errors import ApiError
from serve.schemas import MOST_PARTS, MOST_TEXT, ChatRequest
from serve.translations import MOST_FAULTS, faults
from tests.serve.conftest import HTTP, Running, wav

AUDIO = {
    "type": "input_audio",
    "input_audio": {"data": base64.b64encode(wav(0.5)).decode(), "format": "wav"},
}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def said(role: str, *parts: Any) -> dict[str, Any]:
    """A message; of one string if that is what is given."""
    return {"role": role, "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def ask(server: Running, *messages: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"model": "fake", "messages": messages, **fields}
    return HTTP.post(f"{server.url}/v1/chat/completions", json=body)


@pytest.mark.parametrize(
    ("lang", "messages"),
    [
        ("de", [said("user", AUDIO)]),
        ("zh", [said("user", text("Translate into Chinese."), AUDIO)]),
        ("zh", [said("user", text("Chinese, please."), AUDIO)]),
        # The language stands elsewhere, and the recording's message says something else.
        (
            "zh",
            [
                said("system", "You are a translator into Chinese."),
                said("user", text("Please go on."), AUDIO),
            ],
        ),
        ("zh", [said("developer", text("Translate into Chinese.")), said("user", AUDIO)]),
        ("zh", [said("user", text("Into Chinese, please.")), said("user", text("Now."), AUDIO)]),
        ("zh", [said("user", AUDIO), said("user", "Translate this into Chinese.")]),
        # The latest counts, one asked for before one only named, the recording's own before all.
        (
            "zh",
            [
                said("system", "Translate into German."),
                said("user", "Rather into Chinese."),
                said("user", AUDIO),
            ],
        ),
        (
            "zh",
            [
                said("system", "Translate into Chinese."),
                said("user", "It is about German politics."),
                said("user", AUDIO),
            ],
        ),
        (
            "de",
            [said("system", "Translate into Chinese."), said("user", text("To German!"), AUDIO)],
        ),
        # The model's own words ask for nothing.
        (
            "de",
            [
                said("assistant", "Shall I translate into Chinese?"),
                said("user", text("No."), AUDIO),
            ],
        ),
        # What is heard is named, and the model cannot write it.
        ("de", [said("user", text("Translate the English speech."), AUDIO)]),
        (
            "zh",
            [
                said("system", "Translate into Chinese."),
                said("user", text("Translate the English speech."), AUDIO),
            ],
        ),
    ],
)
def test_the_language_that_the_messages_name(serve_fake, lang: str, messages: list[Any]) -> None:
    with serve_fake() as server:
        answer = ask(server, *messages)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == f"{lang} 0.50"


@pytest.mark.parametrize(
    ("lang", "said"),
    [
        (None, "Translate the English speech."),
        (None, "Translate from English."),
        ("de", "German. The recording is in English audio."),
        ("de", "From English into German"),
        ("en", "Translate the German speech into English"),
        ("fr", "Put this into French"),
        # Not all that stands after "to" is asked for.
        ("de", "Translate into German. You will listen to English speech."),
        ("de", "Translate into German. Listen carefully to the English."),
        ("de", "Translate into German. You talk to English-speaking users."),
        (None, "Please listen to English audio."),
        ("de", "Target language: German. Source language: English."),
        ("de", "**Source language:** English. **Target language:** German."),
        ("de", "The source language is English, the output language is German."),
        (None, "Source: English"),
        ("de", "English-to-German"),
        ("de", "Translate this to German text."),
        # Other names.
        ("zh", "Translate into Mandarin."),
        ("zh", "Translate into simplified Chinese."),
        ("pt", "Translate into Brazilian Portuguese."),
        ("fa", "Translate to Farsi."),
        # Known to nobody here, and asked for all the same.
        ("swedish", "Translate into Swedish."),
        ("hindi", "Translate the English speech to Hindi"),
        ("swedish", "Target language: Swedish"),
        (None, "Swedish is spoken by ten million."),
        (None, "Le discours en Germany"),
    ],
)
def test_what_is_heard_is_not_what_is_asked_for(lang: str | None, said: str) -> None:
    assert asked_language([said], ("de", "en")) == lang
    assert asked_language([said, "Translate into Chinese."], ("de", "en")) == (lang or "zh")


@pytest.mark.parametrize("name", ["French", "Swedish", "Brazilian Portuguese"])
def test_a_language_that_is_asked_for_and_not_there(serve_fake, name: str) -> None:
    with serve_fake() as server:
        answer = ask(server, said("user", text(f"Translate into {name}."), AUDIO))
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "unsupported_language"


@pytest.mark.parametrize(
    "said", ["good ", "into good good good ", "listen aly ", "to ", "source   "]
)
def test_searching_takes_no_longer_for_texts_made_for_it(said: str) -> None:
    """Else a quarter of an hour for the longest that are searched, in which the server does nothing else."""
    began_s = time.process_time()
    assert asked_language([said * (MOST_SEARCHED // len(said))], ("de",)) is None
    assert time.process_time() - began_s < 5.0


@pytest.mark.parametrize(
    "field",
    [
        '"messages":[{"role":"user","content":[%s]}]',
        '"messages":[%s]',
        '"messages":[{"role":"user","content":"x"}],"modalities":[%s]',
    ],
)
@pytest.mark.parametrize("item", ["{}", "0"])
def test_a_million_wrong_items_are_one_fault(serve_fake, field: str, item: str) -> None:
    few = f'{{"model":"fake",{field % ",".join([item] * (MOST_PARTS - 5))}}}'
    many = f'{{"model":"fake",{field % ",".join([item] * 1_000_000)}}}'
    for body in (few, many):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate_json(body)
        assert caught.value.error_count() < 4
    # Read whole, they would take hundreds of megabytes before any could be wrong.
    with pytest.raises(ApiError) as refusal:
        read_chat(many.encode())
    assert refusal.value.code == "too_long"
    with serve_fake() as server:
        for body in (few, many):
            answer = HTTP.post(f"{server.url}/v1/chat/completions", content=body)
            assert answer.status_code == 400, answer.text
            assert len(answer.text) < 1_000


def test_faults_that_are_many_are_counted() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[int]).validate_python(["x"] * (MOST_FAULTS + 1))
    assert "101 faults" in faults(caught.value).message


def test_a_fault_is_named_by_its_place(serve_fake) -> None:
    with serve_fake() as server:
        answer = ask(server, said("user", {"type": "text"}, AUDIO))
        assert answer.json()["error"]["param"] == "messages.0.content.0.text.text"
        assert "required" in answer.json()["error"]["message"]


def test_letters_that_take_four_bytes_are_not_kept(serve_fake) -> None:
    audio = {"type": "input_audio", "input_audio": {"data": "A" * 1000 + "\U0001f600"}}
    body = {"model": "fake", "messages": [{"role": "user", "content": [audio]}]}
    with serve_fake() as server:
        answer = HTTP.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "base64" in answer.json()["error"]["message"]
    known = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
    chat = read_chat(json.dumps(known | {"metadata": "\U0001f600" * 1000}).encode())
    assert chat.model_extra == {"metadata": None}


def test_texts_have_a_bound(serve_fake) -> None:
    long = "x" * MOST_TEXT
    with serve_fake() as server:
        for message in (said("system", long + "x"), said("system", text(long + "x"))):
            answer = ask(server, message, said("user", AUDIO))
            assert answer.status_code == 400
            assert f"at most {MOST_TEXT} characters" in answer.json()["error"]["message"]
        many = [said("user", long)] * (MOST_SEARCHED // MOST_TEXT + 1)
        answer = ask(server, *many, said("user", AUDIO))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "to_language"
        # Named, it need not be searched for; nor in what the model said itself.
        assert ask(server, *many, said("user", AUDIO), to_language="zh").status_code == 200
        history = [said("assistant", long)] * len(many)
        assert ask(server, *history, said("user", AUDIO)).status_code == 200


def test_marks_within_texts_are_no_burden(serve_fake) -> None:
    with serve_fake() as server:
        commas = said("system", "," * (MOST_MARKS - 100))
        assert ask(server, commas, said("user", AUDIO)).status_code == 200


def test_null_is_as_good_as_absent(serve_fake) -> None:
    with serve_fake() as server:
        blank = ask(server, said("user", text("Into Chinese."), AUDIO), to_language="")
        assert blank.json()["choices"][0]["message"]["content"] == "zh 0.50"
        assert ask(server, said("user", AUDIO), stream=None).json()["object"] == "chat.completion"
        options = {"include_usage": None}
        answer = ask(server, said("user", AUDIO), stream=True, stream_options=options)
        assert answer.status_code == 200
        assert '"usage"' not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_chat_names_what_has_no_effect(serve_fake, stream: bool) -> None:
    odd = {"seed": 1, "top_p": None, "a,b": 1, "a\r\nb": 1, "x" * 65: 1}
    with serve_fake() as server:
        answer = ask(server, said("user", AUDIO), stream=stream, n=1, **odd)
        assert answer.headers["x-halve-ignored"] == "seed,top_p"
        answer = ask(server, said("user", AUDIO), stream=stream)
        assert "x-halve-ignored" not in answer.headers


@pytest.mark.parametrize("stream", ["false", "true"])
def test_forms_name_lists_without_effect(serve_fake, stream: str) -> None:
    lists = {"timestamp_granularities[]": "word", "include[]": "logprobs"}
    with serve_fake() as server:
        answer = server.post(wav(0.5), stream=stream, **lists)
        assert answer.headers["x-halve-ignored"] == "include[],timestamp_granularities[]"
        many = {f"{index:02d}{'x' * 60}": "y" for index in range(25)}
        named = server.post(wav(0.5), stream=stream, **many).headers["x-halve-ignored"]
        assert len(named) < 1_100
        long = server.post(wav(0.5), stream=stream, **{"x" * 2_000: "y"})
        assert "x-halve-ignored" not in long.headers


def test_the_document_allows_null(serve_fake) -> None:
    with serve_fake() as server:
        document = json.loads(server.get("/openapi.json").text)
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    fields = body["content"]["application/json"]["schema"]["properties"]
    assert {"type": "null"} in fields["stream"]["anyOf"]


def test_audio_in_lines_of_base64(serve_fake) -> None:
    lines = base64.encodebytes(wav(0.9)).decode()
    part = {"type": "input_audio", "input_audio": {"data": lines, "format": "wav"}}
    with serve_fake() as server:
        answer = ask(server, said("user", text("Into Chinese."), part))
        assert answer.json()["choices"][0]["message"]["content"] == "zh 0.90"


def test_a_chat_that_goes_on_has_its_latest_recording_translated(serve_fake) -> None:
    """Chat programs send what was said before again, recordings and all."""
    longer = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(wav(0.9)).decode(), "format": "wav"},
    }
    history = [said("user", text("Into Chinese."), AUDIO), said("assistant", "zh 0.50")]
    with serve_fake() as server:
        answer = ask(server, *history, said("user", longer))
        assert answer.json()["choices"][0]["message"]["content"] == "zh 0.90"
        both = ask(server, *history, said("user", longer, AUDIO))
        assert both.status_code == 400 and "2 input_audio parts" in both.text

"""The official client against a real model behind a real socket."""

import base64
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
import soundfile
from openai.types.audio import TranscriptionStreamEvent

from export.runtime import open_translator
from halve.translate import Translation, Translator
from serve.settings import ServeSettings
from tests import tiny
from tests.serve.conftest import Running, serving

# The client marks its own audio translations as deprecated; its users still have them.
pytestmark = pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def translator(tiny_model: Path) -> Translator:
    return open_translator(tiny_model, threads=1)


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Running]:
    settings = ServeSettings(models=(str(tiny_model),), threads=1, segment_s=10.0)
    with serving(settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


CLIP = tiny.tone(1.5, 11)


def flac(samples: np.ndarray) -> tuple[str, bytes]:
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="FLAC", subtype="PCM_16")
    return "clip.flac", file.getvalue()


def heard(samples: np.ndarray) -> np.ndarray:
    """The samples after 16-bit FLAC."""
    return soundfile.read(io.BytesIO(flac(samples)[1]), dtype="float32")[0]


@pytest.fixture(scope="module")
def expected(translator: Translator) -> Translation:
    return translator.translate([heard(CLIP)], "de")[0]


def create(client: openai.OpenAI, samples: np.ndarray, **options: object) -> object:
    body = {"to_language": "de"}
    return client.audio.translations.create(
        model="tiny", file=flac(samples), extra_body=body, **options
    )


def test_json_equals_the_translation_without_a_server(
    client: openai.OpenAI, expected: Translation
) -> None:
    assert expected.text
    assert create(client, CLIP).text == expected.text
    assert create(client, CLIP, temperature=0).text == expected.text


def test_verbose_json(client: openai.OpenAI, expected: Translation) -> None:
    found = create(client, CLIP, response_format="verbose_json")
    assert found.text == expected.text
    assert found.language == "german"
    assert found.duration == 1.5
    (segment,) = found.segments
    assert (segment.start, segment.end, segment.id) == (0.0, 1.5, 0)
    assert segment.tokens == expected.tokens
    assert segment.stopped == expected.stopped
    assert found.truncated == (expected.stopped != "end")
    assert found.coverage == (expected.stopped == "end")


def test_text_srt_vtt(client: openai.OpenAI, expected: Translation) -> None:
    line = " ".join(expected.text.split()).replace("-->", "->")
    assert create(client, CLIP, response_format="text") == expected.text + "\n"
    srt = create(client, CLIP, response_format="srt")
    assert srt == f"1\n00:00:00,000 --> 00:00:01,500\n{line}\n"
    vtt = create(client, CLIP, response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.500\n")


def test_stream_of_the_audio_api(client: openai.OpenAI, expected: Translation) -> None:
    name, content = flac(CLIP)
    stream = client.post(
        "/audio/translations",
        body={"model": "tiny", "to_language": "de", "stream": "true"},
        files={"file": (name, content)},
        options={"headers": {"Content-Type": "multipart/form-data"}},
        cast_to=TranscriptionStreamEvent,
        stream=True,
        stream_cls=openai.Stream[TranscriptionStreamEvent],
    )
    *deltas, done = stream
    assert {delta.type for delta in deltas} == {"transcript.text.delta"}
    assert len(deltas) > 3
    assert "".join(delta.delta for delta in deltas) == done.text == expected.text
    assert done.type == "transcript.text.done"
    assert done.segments[0]["tokens"] == expected.tokens


def message(samples: np.ndarray, text: str) -> list[dict]:
    data = base64.b64encode(flac(samples)[1]).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, audio]}]


def test_chat(client: openai.OpenAI, expected: Translation) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=message(CLIP, "Translate the English speech into German:")
    )
    assert found.choices[0].message.content == expected.text
    assert found.usage.completion_tokens == len(expected.tokens)
    assert found.choices[0].finish_reason == ("stop" if expected.stopped == "end" else "length")


def test_chat_stream(client: openai.OpenAI, expected: Translation) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=message(CLIP, "German, please."),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected.text
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    whole = 1.0 if expected.stopped == "end" else 0.0
    (last,) = (chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason)
    assert last.halve == {
        "duration": pytest.approx(len(CLIP) / 16_000, abs=0.01),
        "coverage": whole,
    }


def test_chat_token_limit(client: openai.OpenAI, expected: Translation) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=message(CLIP, "into German"), max_tokens=3
    )
    assert found.usage.completion_tokens == 3
    assert found.choices[0].finish_reason == "length"


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").loaded is True
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_a_checkpoint_without_a_language_asks_for_one(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Say which language"):
        client.audio.translations.create(model="tiny", file=flac(CLIP))


def test_long_audio_is_split_at_pauses_and_joined(
    client: openai.OpenAI, translator: Translator, speech: np.ndarray
) -> None:
    found = create(client, speech, response_format="verbose_json")
    assert found.duration == len(speech) / 16_000
    times = [(segment.start, segment.end) for segment in found.segments]
    assert times[0][0] == 0.0
    assert times[-1][1] == found.duration
    assert all(before[1] == after[0] for before, after in itertools.pairwise(times))
    assert all(end - start <= 10.0 for start, end in times)
    # A pause of 0.4 s ends every third second.
    assert all(start % 3.0 >= 2.55 or start % 3.0 < 0.05 for start, _ in times)
    samples = heard(speech)
    parts = [samples[round(start * 16_000) : round(end * 16_000)] for start, end in times]
    texts = [translator.translate([part], "de")[0].text for part in parts]
    assert [segment.text for segment in found.segments] == texts
    assert found.text == " ".join(text for text in texts if text)


def test_a_long_stream_joins_its_parts_alike(server: Running, speech: np.ndarray) -> None:
    whole = server.post(flac(speech)[1], model="tiny", to_language="de").json()["text"]
    answer = server.post(flac(speech)[1], model="tiny", to_language="de", stream="true")
    lines = [line for line in answer.text.splitlines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event.get("delta", "") for event in events) == whole == events[-1]["text"]


def test_silence_between_is_not_translated(client: openai.OpenAI) -> None:
    quiet = np.zeros(16_000 * 25, np.float32)
    found = create(client, np.concatenate([CLIP, quiet]), response_format="verbose_json")
    assert [segment.stopped == "silence" for segment in found.segments][-1]
    assert found.segments[-1].text == ""
    # Clients in .NET and Rust refuse null here, also for silence.
    unmeasured = ("avg_logprob", "no_speech_prob", "temperature")
    assert [getattr(found.segments[-1], name) for name in unmeasured] == [0.0, 0.0, 0.0]
    assert found.segments[-1].compression_ratio == 0.0 < found.segments[0].compression_ratio


@pytest.mark.parametrize("duration_s", [0.02, 0.05, 0.3])
def test_very_short_audio(client: openai.OpenAI, duration_s: float) -> None:
    assert isinstance(create(client, tiny.tone(duration_s, 1)).text, str)


def test_silence_alone(client: openai.OpenAI) -> None:
    assert isinstance(create(client, np.zeros(32_000, np.float32)).text, str)


def test_the_document_describes_what_is_served(server: Running) -> None:
    document = server.get("/openapi.json").json()
    form = document["paths"]["/v1/audio/translations"]["post"]["requestBody"]["content"]
    fields = form["multipart/form-data"]["schema"]["properties"]
    assert {"file", "model", "to_language", "response_format", "stream"} <= set(fields)
    assert "/v1/chat/completions" in document["paths"]
    assert "/v1/models" in document["paths"]
    # Definitions that bodies refer to must be found where they point.
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "')[1:]}:
        node = document
        for key in reference.removeprefix("#/").split("/"):
            node = node[key]


def test_the_yardstick_gives_the_same_text(tiny_model: Path, expected: Translation) -> None:
    settings = ServeSettings(models=(str(tiny_model),), threads=1, engine="plain")
    with serving(settings) as server:
        answer = server.post(flac(CLIP)[1], model="tiny", to_language="de")
        assert answer.json()["text"] == expected.text

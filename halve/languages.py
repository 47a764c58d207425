"""The languages halve translates into, and what depends on them."""

import math
from dataclasses import dataclass

from halve.errors import InputError


@dataclass(frozen=True)
class Language:
    """A language as prompts and metrics need it."""

    code: str
    """ISO 639-1."""
    name: str
    """English name, as the prompt says it."""
    selection_metric: str
    """The metric that layers and settings are chosen by (Moslem 2025: chrF++; chrF for Chinese)."""
    bleu_tokenizer: str
    """sacrebleu's tokenizer for BLEU."""
    joiner: str
    """What stands between the translations of two stretches of one recording."""


def _spaced(code: str, name: str) -> Language:
    return Language(code, name, "chrf++", "13a", " ")


def _unspaced(code: str, name: str, tokenizer: str) -> Language:
    # chrF's word n-grams mean nothing where words are not separated by spaces.
    return Language(code, name, "chrf", tokenizer, "")


LANGUAGES: dict[str, Language] = {
    language.code: language
    for language in (
        _spaced("ar", "Arabic"),
        _spaced("cs", "Czech"),
        _spaced("de", "German"),
        _spaced("en", "English"),
        _spaced("es", "Spanish"),
        _spaced("fa", "Persian"),
        _spaced("fr", "French"),
        _spaced("it", "Italian"),
        _unspaced("ja", "Japanese", "char"),
        _spaced("ko", "Korean"),
        _spaced("nl", "Dutch"),
        _spaced("pl", "Polish"),
        _spaced("pt", "Portuguese"),
        _spaced("ru", "Russian"),
        _unspaced("th", "Thai", "char"),
        _spaced("tr", "Turkish"),
        _spaced("uk", "Ukrainian"),
        _spaced("vi", "Vietnamese"),
        _unspaced("zh", "Chinese", "zh"),
    )
}

ENGLISH = LANGUAGES["en"]


def language(code: str) -> Language:
    """The language of an ISO 639-1 code (a region, as in de-AT or zh_CN, is ignored).

    Raises:
        InputError: the code is not known.
    """
    key = code.strip().lower().replace("_", "-").split("-")[0]
    if key not in LANGUAGES:
        raise InputError(
            f"Unknown language {code!r}",
            expected=f"one of {', '.join(sorted(LANGUAGES))}",
            mend="use the two-letter code, or add a row to halve/languages.py",
        )
    return LANGUAGES[key]


TOKENS_BEFORE_SPEECH = 24
TOKENS_PER_SECOND = 12


def token_limit(duration_s: float) -> int:
    """The most tokens that the translation of so much speech may take.

    People speak three to four words a second and small vocabularies spend up to three tokens a
    word, so only a runaway loop meets this. It is the same wherever halve translates, so that
    scores can be repeated.
    """
    return TOKENS_BEFORE_SPEECH + math.ceil(TOKENS_PER_SECOND * duration_s)

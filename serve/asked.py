"""Which language the texts of a chat ask for: "Translate the English speech into German"."""

import re

from halve.languages import LANGUAGES
from serve.errors import bad_field

MOST_SEARCHED = 200_000
"""Characters that are searched: at most a tenth of a second in which the server does nothing else."""

_OTHERS = """
    afrikaans albanian amharic armenian assamese azerbaijani bashkir basque belarusian bengali bangla
    bosnian breton bulgarian burmese cantonese catalan cebuano corsican croatian danish dari esperanto
    estonian faroese filipino finnish frisian galician georgian greek greenlandic guarani gujarati haitian
    hausa hawaiian hebrew hindi hmong hungarian icelandic igbo indonesian irish javanese kannada kazakh
    khmer kinyarwanda klingon kurdish kyrgyz latin latvian lingala lithuanian luxembourgish macedonian
    malagasy malay malayalam maltese maori marathi mongolian nepali norwegian occitan odia oromo pashto
    punjabi quechua romanian romansh samoan sanskrit serbian sesotho setswana shona sindhi sinhala slovak
    slovene slovenian somali sundanese swahili swedish tagalog tajik tamil tatar telugu tibetan tigrinya
    tongan turkmen urdu uyghur uzbek welsh wolof xhosa yiddish yoruba zulu
"""
"""Languages that halve does not know: asked for, they are refused by their names."""
_ALIASES = {"mandarin": "zh", "farsi": "fa", "castilian": "es", "flemish": "nl"}

_KNOWN = {
    **{name: code for name, code in _ALIASES.items() if code in LANGUAGES},
    **{language.name.lower(): language.code for language in LANGUAGES.values()},
}
_CODES = {**{name: name for name in _OTHERS.split()}, **_KNOWN}
_KINDS = (
    "modern|standard|simplified|traditional|brazilian|european|american|british|canadian|mexican|swiss|"
    r"austrian|latin[\s-]american|spoken|written|formal|informal|colloquial|simple|plain|natural|fluent|good"
)
_LABEL = r"(?:[\s-]language)?[^\w.!?]{1,4}(?:is\s+)?"
_HEARD = (
    "speech|audio|recordings?|sounds?|voices?|talks?|podcasts?|lectures?|conversations?|clips?|files?|videos?|"
    "speaking|speakers?|people|listeners?|customers?|users?"
)
_NAMED = re.compile(
    rf"""
    \b(?:
        (?:
            (?P<heard> (?:listen\w*|attend\w*|react\w*|refer\w*|belong\w*|respond\w*|due)(?:\s+\w+ly)?\s+to\s+(?:the\s+)?
                | from\s+(?:the\s+)?
                | (?:source|input|original|spoken){_LABEL} )
            | (?P<into> into\s+(?:the\s+)? | (?:target|output){_LABEL} )
            | (?P<to> to[\s-]+ )
        )
        (?:(?:{_KINDS})\s+){{0,3}}
        (?P<name> {"|".join(_CODES)} )
        | (?P<bare> {"|".join(_KNOWN)} )
    )\b
    (?P<noun> [\s-]+(?:{_HEARD})\b )?
    """,
    re.VERBOSE,
)


def asked_language(texts: list[str], known: tuple[str, ...]) -> str | None:
    """The language that instructions such as "Translate into German" ask for.

    The first text, the recording's own, goes before the others. Among those, one named after "into"
    or "to" goes before one only named.

    Args:
        texts: as from `serve.chat.read_message`.
        known: codes that the model translates into; others count only after "into" or "to".

    Returns:
        its code; the name of one that halve does not know; None where none is asked for.

    Raises:
        ApiError: too much text to search.
    """
    if sum(map(len, texts)) > MOST_SEARCHED:
        raise bad_field(
            "to_language",
            f"The messages are longer than {MOST_SEARCHED:,} characters together, which are not "
            "searched for a language: name it in to_language.",
        )
    own, *others = [_named(text, known) for text in texts]
    order = [*own, *(into for into, _ in others), *(bare for _, bare in others)]
    return next((code for code in order if code), None)


def _named(text: str, known: tuple[str, ...]) -> tuple[str | None, str | None]:
    """(the last language after "into" or "to", the last known one) that a text names."""
    into, bare = None, None
    for found in _NAMED.finditer(text.lower()):
        code = _CODES[found["name"] or found["bare"]]
        if found["into"] or (found["to"] and not found["noun"]):
            into = code
        # "The English speech", "listen to English": what is heard, not what is asked for.
        elif code in known and found["bare"] and not found["noun"]:
            bare = code
    return into, bare

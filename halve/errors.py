"""Every error that a user can cause.

    HalveError                  exit 1
    ├── InputError              exit 2   wrong usage or bad input
    │   ├── RecipeError
    │   ├── GpuError
    │   ├── CorpusError
    │   ├── ArtefactError
    │   └── FamilyError
    ├── ParityError             exit 1   a package does not translate as its student does
    └── MissingExtraError       exit 1   an optional part of halve is not installed

Each says what was found, what was expected and how to mend it; the command line prints that as one
line and no traceback.
"""

from collections.abc import Sequence


class HalveError(Exception):
    """What was found, what was expected, and how to mend it."""

    exit_code = 1

    def __init__(self, found: str, expected: str = "", mend: str = "") -> None:
        self.found = found
        self.expected = expected
        self.mend = mend
        parts = [found]
        if expected:
            parts.append(f"Expected: {expected}.")
        if mend:
            parts.append(f"To mend it: {mend}.")
        super().__init__(" ".join(_sentence(part) for part in parts))


def _sentence(text: str) -> str:
    text = text.strip()
    while text.endswith(".."):
        text = text[:-1]
    return text if text.endswith((".", "!", "?", ":")) else f"{text}."


class InputError(HalveError):
    """Wrong usage or bad input."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe or a stage's settings cannot be used."""


class GpuError(InputError):
    """A GPU was asked for, and the runtime cannot use one here."""


class CorpusError(InputError):
    """Audio, text or a manifest cannot be used; `faults` lists every fault found."""

    def __init__(
        self, found: str, expected: str = "", mend: str = "", faults: Sequence[str] = ()
    ) -> None:
        self.faults = tuple(faults)
        super().__init__(found, expected, mend)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  {fault}" for fault in self.faults)])


class ArtefactError(InputError):
    """A directory is not the artefact that was asked for, or is damaged."""


class FamilyError(InputError):
    """A model of an unknown family, or one that its family cannot treat as asked."""


class ParityError(HalveError):
    """A package's translations differ from its student's by more than was allowed."""


class MissingExtraError(HalveError):
    """A part of halve that this command needs is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} is not installed", mend=f"pip install 'halve[{extra}]' in this environment"
        )

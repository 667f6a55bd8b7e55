"""The errors that users meet. Everything else that is raised is a bug and keeps its traceback."""

import re

_LONGEST = 3000
# Letters and marks that Unicode counts as printable and that no terminal shows: fillers, joiners, variation selectors.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_UNUSUAL = re.compile("[^ -~]")


class KvcalError(Exception):
    """One line for the user: what is wrong, where, and what to do. The CLI exits with code 2 on it.

    Messages quote what strangers wrote into files: line ends become spaces, and characters that a terminal would act on
    become escapes.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message[:_LONGEST]) + ("…" if len(message) > _LONGEST else ""))


def one_line(text: object) -> str:
    """The text with line ends as spaces; characters that a terminal would act on, that turn the order of others or that
    nobody can see become escapes. What a stranger wrote is printed through this only."""
    return _UNUSUAL.sub(_plain, str(text))


def _plain(found: re.Match[str]) -> str:
    character = found[0]
    if character.isspace():
        return " "
    shown = character.isprintable() and not _INVISIBLE.fullmatch(character)
    return character if shown else ascii(character)[1:-1]


class ArtifactError(KvcalError):
    """An artifact that cannot be trusted: damaged, foreign, or of another schema."""


class MismatchError(KvcalError):
    """An artifact and a model that do not belong together."""


class MissingPackageError(KvcalError, ImportError):
    """A package that an extra of kvcal brings is not installed; the line that installs it is in the message."""

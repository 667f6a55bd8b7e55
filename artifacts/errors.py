"""The errors that users meet. Everything else that is raised is a bug and keeps its traceback."""

_LONGEST = 3000


class KvcalError(Exception):
    """One line for the user: what is wrong, where, and what to do. The CLI exits with code 2 on it.

    Messages quote what strangers wrote into files: line ends become spaces, and characters that a terminal would act on
    become escapes.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message[:_LONGEST]) + ("…" if len(message) > _LONGEST else ""))


def one_line(text: str) -> str:
    """Line ends as spaces, characters that a terminal would act on or cannot show as escapes."""
    return "".join(
        character if character.isprintable() else " " if character.isspace() else f"{ascii(character)[1:-1]}"
        for character in text
    )


class ArtifactError(KvcalError):
    """An artifact that cannot be trusted: damaged, foreign, or of another schema."""


class MismatchError(KvcalError):
    """An artifact and a model that do not belong together."""

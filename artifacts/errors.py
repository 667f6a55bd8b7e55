"""The errors that users meet. Everything else that is raised is a bug and keeps its traceback."""


class KvcalError(Exception):
    """One line for the user: what is wrong, where, and what to do. The CLI exits with code 2 on it."""


class ArtifactError(KvcalError):
    """An artifact that cannot be trusted: damaged, foreign, or of another schema."""


class MismatchError(KvcalError):
    """An artifact and a model that do not belong together."""

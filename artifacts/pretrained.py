"""`from_pretrained`, `save_pretrained` and `push_to_hub`, the names that users of transformers know, for an artifact.

The only file of this room that imports the rooms above, and only when one of these is called: opening from the Hub is
the runtime's, publishing is the calibration's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..calibrate.publish import Pushed
    from .artifact import Artifact


class Pretrained:
    """Mixed into `Artifact`."""

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], revision: str | None = None) -> Artifact:
        """`kvcal.load`: open a folder or a Hub id, and verify it.

        Raises:
            KvcalError: not found; as ArtifactError: damaged, or of a newer schema.
        """
        from ..runtime.loading import load

        return load(source, revision)

    def save_pretrained(self: Artifact, folder: str | os.PathLike[str]) -> Artifact:  # type: ignore[misc]
        """`kvcal.artifacts.save`: write a new folder, or update the one it was loaded from; its plan goes with it.

        Returns:
            The artifact as saved, with its `folder` and `content_hash`.

        Raises:
            ArtifactError: `folder` exists and this artifact was not loaded from it.
            KvcalError: the disk is full or not writable.
        """
        from ..runtime.planned import FILE, has_plan
        from .folder import save
        from .plain_files import read_plain

        extras = {FILE: read_plain(self.folder / FILE)} if self.folder and has_plan(self) else {}
        return save(self, folder, extras)

    def push_to_hub(  # type: ignore[misc]
        self: Artifact,
        repo_id: str,
        *,
        branch: str | None = None,
        private: bool = False,
        slim: bool = False,
        commit_message: str | None = None,
    ) -> Pushed:
        """`kvcal.calibrate.push`: verify the artifact where it is saved, and upload it with its card as one commit.

        Args:
            slim: send only what decoding needs.

        Raises:
            KvcalError: not saved yet, no token, no permission, no network, or the Hub failed.
        """
        from ..calibrate.publish import push
        from .errors import ArtifactError

        if self.folder is None:
            raise ArtifactError(f"{self.name}: not saved yet: call save_pretrained(folder), and push what it returns")
        return push(self.folder, repo_id, branch=branch, private=private, slim=slim, message=commit_message)

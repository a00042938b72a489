"""What a server has and does not show: asked for where it matters whether an image is hidden, or elsewhere."""

from __future__ import annotations

from typing import Protocol

from worker.dicom.instances import Instance
from worker.pacs.protocol import Deletion, Found, Outcome


class Hiding(Protocol):
    """Of a server that can hide images, or keep one in another study than it was sent with, and call that stored."""

    def find_study(self, study_instance_uid: str) -> list[Found]:
        """The study, although all of its images may be hidden; [] also where the account may not look."""
        ...

    def why_unseen(self, instance: Instance) -> Outcome | None:
        """What became of an image that was answered as stored, and is not shown in its study.

        None: it is shown by now, or the server does not say.
        """
        ...

    def images(self, study_instance_uid: str) -> list[Found] | None:
        """The images of the study that deletions which only hide have hidden; None where the account may not look."""
        ...

    def revoke(self, found: Found) -> int:
        """Show again what such deletions have hidden of ``found``; how many images that were."""
        ...

    def delete_hidden(self, study_instance_uid: str) -> Deletion:
        """Delete for good a study of which all images are hidden. Nothing is hidden for that.

        It SHALL be refused, or find nothing, where one of the images is shown. What the settings protect is not known
        here: the caller asks `Pacs.deletion` first.
        """
        ...

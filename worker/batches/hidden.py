"""Studies that a batch hides, and shows again when it is undone: by the archive's own revoke, of what the batch hid.

What others have hidden of a study, before or after, stays hidden. Oddity: "What is hidden is shown elsewhere".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from courier.errors import PacsMisanswered, StudyConflict
from worker.batches.removals import hidden_on, revoke
from worker.batches.study_copy import images_on
from worker.jobs.receipts import Receipts
from worker.pacs.protocol import Pacs
from worker.storage.study_marks import StudyFingerprint


def what_is_shown(pacs: Pacs, study_uid: str) -> dict[str, Any] | None:
    """What has to be known of a study to show it again, once it is hidden; None where nothing can be shown again."""
    if pacs.hiding is None or not (shown := images_on(pacs, study_uid)):
        return None
    if (before := hidden_on(pacs, study_uid)) is None:
        return None
    fingerprint = StudyFingerprint.of(study_uid, shown)
    return {"images": fingerprint.images, "images_sha256": fingerprint.images_sha256, "before": sorted(before)}


def show_again(pacs: Pacs, study_uid: str, told: Mapping[str, Any], receipts: Receipts) -> dict[str, Any]:
    """Revoke what hid the images that `what_is_shown` told of, and see that they are shown.

    Raises
    ------
    StudyConflict
        They are not all there any more, or others were hidden with them since; nothing was shown again.
    PacsMisanswered
        The archive does not show them; it is tried again.
    """
    name = pacs.server.name
    fingerprint, before = StudyFingerprint(study_uid, told["images"], told["images_sha256"]), set(told["before"])
    hidden = hidden_on(pacs, study_uid)
    ours, shown = (hidden or frozenset()) - before, images_on(pacs, study_uid).keys()
    if hidden is None or fingerprint not in (
        StudyFingerprint.of(study_uid, ours),
        StudyFingerprint.of(study_uid, ours | shown),
    ):
        sentence = (
            f"{name} hides {len(ours)} images of the study, and the batch hid {fingerprint.images}: the archive may"
            " have deleted some since (by default after a day), or others were hidden too. Nothing was shown again;"
            " revoke the rejection of its images in the archive."
        )
        raise StudyConflict(sentence, server_name=name, server_type=pacs.server.type)
    revoke(pacs, study_uid, ours, receipts)
    if lacking := ours - images_on(pacs, study_uid).keys():
        sentence = f"{name} still hides {len(lacking)} images of the study; it is looked at again."
        raise PacsMisanswered(sentence, server_name=name, server_type=pacs.server.type)
    return {"shown": len(ours)}

"""Bring one study from the PACS that has it to a ZIP file or a folder: `pacs.download`.

The images pass through as they arrive: each is identified and hashed on the way, none is kept. What came is compared
with the list that the server gave before; only then the destination shows it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zipstream.ng import ZIP_DEFLATED, ZipStream

from courier.errors import (
    Cancelled,
    CourierError,
    InvalidRequest,
    InvalidUid,
    MissingUid,
    NotDicom,
    NotFound,
    PacsMisanswered,
)
from courier.messages import DownloadJob, read_job
from courier.redaction import about, redact_url
from courier.results import DownloadPayload
from worker.dicom.instances import Instance
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.lookup import find_on_servers, not_asked, settle
from worker.jobs.maintenance import warned
from worker.jobs.services import Services
from worker.jobs.streamed_instance import Incoming
from worker.pacs.protocol import Found, Pacs, View
from worker.storage.destinations import Archive, Files, StudyFingerprint
from worker.storage.study_marks import MANIFEST, occupied

#: How soon to look again whether the other job with the same destination has ended.
TURN_S = 1.0
#: Pixels of uncompressed images shrink to half at this level; more effort gains little.
COMPRESS_LEVEL = 1
#: Warning: the store could not promise that what was written replaced nothing.
OVERWRITE_NOT_PREVENTED = "overwrite_not_prevented"
#: After so many images it is asked whether the job is still wanted.
IMAGES_BETWEEN_LOOKS = 50


@dataclass
class _Study:
    """One study on its way: what the server says that it holds, and what has come of it."""

    pacs: Pacs
    found: Found
    attempt: Attempt
    series_of: Mapping[str, str]
    #: Called now and then with the number of images that came; raises if nobody wants the rest.
    still_wanted: Callable[[int], None]
    view: View = "as_set"
    received: dict[str, dict[str, Any]] = field(default_factory=dict)
    resumed: int = 0
    #: Servers in maintenance, which may have the study as well.
    not_asked: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> StudyFingerprint:
        return StudyFingerprint.of(self.found.study_instance_uid, self.series_of)

    @property
    def missing(self) -> list[str]:
        return [image for image in self.series_of if image not in self.received]

    def unreadable(self, error: CourierError) -> PacsMisanswered:
        """For what is wrong with an image that the server has sent."""
        return self.misanswered(
            f"{self.pacs.server.name} sent an image that cannot be used. {error.message}", code=error.payload["code"]
        )

    def misanswered(self, sentence: str, **details: Any) -> PacsMisanswered:
        server = self.pacs.server
        return PacsMisanswered(sentence, server_name=server.name, server_type=server.type, details=details)


def download(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """Bring a study to its destination, where it appears when it is whole (docs/jobs.md).

    Raises
    ------
    InvalidRequest
        Nothing can be written there; ``details["reason"]`` says why.
    NotFound
        No server that was asked has the study.
    PacsMisanswered
        What came is not what the server lists: the answer was cut off, or the study changed meanwhile.
    """
    job = read_job(DownloadJob, message)
    return bring(job, attempt, services, still_wanted=lambda done: attempt.write_intent({"transfer": done})).as_json()


def bring(
    job: DownloadJob, attempt: Attempt, services: Services, *, still_wanted: Callable[[int], None]
) -> DownloadPayload:
    """As `download`, for a study of a batch too. ``still_wanted`` is called now and then; what it raises ends it."""
    if attempt.cancelled:  # no job looks at what an earlier attempt has left
        raise Cancelled("The job was cancelled before the download was whole.")
    place, write = _destination(job, services)
    _take_turn(place.shown, attempt)
    with attempt.step("check"):
        replies = find_on_servers("study", job.study_uid, mode=job.mode, fleet=services.fleet)
        reply = settle("study", job.study_uid, replies, waits=True)
        about(server_name=reply.pacs.server.name)
        study = replace(_study(reply.pacs, reply.found[0], attempt, still_wanted), not_asked=tuple(not_asked(replies)))
        there = place.read_fingerprint()
    if there == study.fingerprint:
        return _payload(job, study, {"status": "already_there"})
    if there is not None:
        raise occupied(place.shown)
    try:
        with attempt.step("transfer"):
            written = write(study)
    except InvalidRequest as error:
        if error.details.get("reason") != "exists" or place.read_fingerprint() != study.fingerprint:
            raise
        return _payload(job, study, {"status": "already_there"})  # another attempt has brought the same meanwhile
    return _payload(job, study, {"status": "downloaded", **written}, overwrites_prevented=place.overwrites_prevented)


def _destination(job: DownloadJob, services: Services) -> tuple[Archive | Files, Callable[[_Study], dict[str, Any]]]:
    """Where the job writes to, and what writes a study there."""
    if job.format == "zip":
        archive = services.destinations.archive(job.destination)
        return archive, lambda study: _to_archive(study, archive)
    files = services.destinations.files(job.destination)
    return files, lambda study: _to_files(study, files)


def archived(
    pacs: Pacs, found: Found, place_for: Callable[[StudyFingerprint], Archive], attempt: Attempt
) -> tuple[Archive, StudyFingerprint, str | None]:
    """One server's copy of a study as an archive that may return to it, at the place that is chosen by what is in it.

    The last is the SHA-256 of the archive as it was written; None if it was there already, and was not written again.
    The caller sees to it that no other job writes there.
    """
    study = replace(_study(pacs, found, attempt, lambda _: attempt.check_ours()), view="to_return")
    place = place_for(study.fingerprint)
    there = place.read_fingerprint()
    if there is not None and there != study.fingerprint:
        raise occupied(place.shown)
    written = _to_archive(study, place) if there is None else {}
    return place, study.fingerprint, written.get("sha256")


def _take_turn(shown: str, attempt: Attempt) -> None:
    digest = hashlib.sha256(shown.encode()).hexdigest()
    owner = attempt.ledger.lock_destination(digest, job_id=attempt.job_id, fence=attempt.fence)
    if owner is not None:
        raise Postpone(f"job {owner} is writing to the same destination", delay_s=TURN_S, owner=owner)


def _study(pacs: Pacs, found: Found, attempt: Attempt, still_wanted: Callable[[int], None]) -> _Study:
    """The study with the list of its images."""
    images = {str(one.sop_instance_uid): str(one.series_instance_uid) for one in pacs.instances(found)}
    study = _Study(pacs, found, attempt, images, still_wanted)
    if not images:
        raise study.misanswered(f"{pacs.server.name} lists the study but none of its images.")
    return study


# --- as one ZIP file --------------------------------------------------------------------------------------------


def _to_archive(study: _Study, place: Archive) -> dict[str, Any]:
    digest = hashlib.sha256()
    size_bytes = place.write(_hashed(_zipped(study), digest), study.fingerprint)
    return {"archive_bytes": size_bytes, "sha256": digest.hexdigest()}


def _zipped(study: _Study) -> Iterator[bytes]:
    """The archive as it grows, its manifest last."""
    archive = ZipStream(compress_type=ZIP_DEFLATED, compress_level=COMPRESS_LEVEL)
    for image in _retrieved(study, [study.found]):
        archive.add(image.chunks(), image.name)
        yield from archive.all_files()
        study.received[image.instance.sop_instance_uid] = image.entry()
    _check_whole(study)
    archive.add(_manifest(study), MANIFEST)
    yield from archive.finalize()


def _hashed(chunks: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


# --- as a folder of files ---------------------------------------------------------------------------------------


def _to_files(study: _Study, place: Files) -> dict[str, Any]:
    """File by file; those that an earlier attempt has left are read and kept if they are what they should be."""
    left = place.names()
    names = {name_of(series, image): image for image, series in study.series_of.items()}
    if left - names.keys() - {MANIFEST}:
        raise occupied(place.shown)
    for name in sorted(left & names.keys()):
        _keep(study, names[name], place.read(name))
    for image in _retrieved(study, to_ask(study.found, study.series_of, study.missing)):
        place.write(image.name, image.chunks())
        study.received[image.instance.sop_instance_uid] = image.entry()
    _check_whole(study)
    place.finish(_manifest(study))
    return {"resumed": study.resumed}


def _keep(study: _Study, image_uid: str, content: Iterator[bytes]) -> None:
    """Take what is there for received if it is proven to be all of the image; the rest is brought again."""
    try:
        image = _IncomingFile(content, blame=lambda error: error)
        for _ in image.chunks():
            pass
    except (NotDicom, MissingUid, InvalidUid):
        return
    if image.is_proven and image.instance.sop_instance_uid == image_uid and _belongs(image.instance, study):
        study.received[image_uid] = image.entry()
        study.resumed += 1


def to_ask(study: Found, series_of: Mapping[str, str], missing: Iterable[str]) -> list[Found]:
    """In how large pieces to ask for what is missing: the study, whole series, or single images."""
    wanted = list(missing)
    if len(wanted) == len(series_of):
        return [study]
    uid = study.study_instance_uid
    partly = {series_of[image] for image in series_of.keys() - set(wanted)}
    whole = dict.fromkeys(series_of[image] for image in wanted if series_of[image] not in partly)
    single = [image for image in wanted if series_of[image] in partly]
    return [Found("series", uid, series) for series in whole] + [
        Found("image", uid, series_of[image], image) for image in single
    ]


# --- one image after the other ----------------------------------------------------------------------------------


def name_of(series_uid: str, image_uid: str) -> str:
    return f"{series_uid}/{image_uid}.dcm"


class _IncomingFile(Incoming):
    """One image while it arrives, with its place in a download."""

    @property
    def name(self) -> str:
        return name_of(self.instance.series_instance_uid, self.instance.sop_instance_uid)

    def entry(self) -> dict[str, Any]:
        """Its line in the manifest, once all of it has passed."""
        return {
            "image_uid": self.instance.sop_instance_uid,
            "series_uid": self.instance.series_instance_uid,
            "sop_class_uid": self.instance.sop_class_uid,
            "transfer_syntax_uid": self.instance.transfer_syntax_uid,
            "file": self.name,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
        }


def _retrieved(study: _Study, asked: Iterable[Found]) -> Iterator[_IncomingFile]:
    """Each image of the study as the server sends it; one that does not belong there is an error."""
    name = study.pacs.server.name
    for found in asked:
        try:
            with study.pacs.retrieve(found, view=study.view) as parts:
                for part in parts:
                    _report_progress(study)
                    image = _IncomingFile(part.chunks, blame=study.unreadable)
                    if image.instance.sop_instance_uid in study.received or not _belongs(image.instance, study):
                        raise study.misanswered(f"{name} sent an image that it did not list; the study has changed.")
                    yield image
        except NotFound as error:
            raise study.misanswered(f"{name} lost a part of the study meanwhile; it is looked at again.") from error


def _report_progress(study: _Study) -> None:
    """Show how far it is, and learn now and then whether the job is still wanted and still ours."""
    done = len(study.received)
    study.attempt.stage = f"transfer {done}/{len(study.series_of)}"
    if done % IMAGES_BETWEEN_LOOKS == 0:
        study.still_wanted(done)


def _belongs(instance: Instance, study: _Study) -> bool:
    return (
        instance.study_instance_uid == study.found.study_instance_uid
        and study.series_of.get(instance.sop_instance_uid) == instance.series_instance_uid
    )


def _check_whole(study: _Study) -> None:
    if study.missing:
        raise study.misanswered(
            f"{study.pacs.server.name} sent {len(study.received)} of {len(study.series_of)} images; it is tried again.",
            expected=len(study.series_of),
            received=len(study.received),
            missing=study.missing[:10],
        )


def _manifest(study: _Study) -> bytes:
    entries = [study.received[image] for image in sorted(study.received)]
    server = study.pacs.server
    document = {
        "version": 1,
        "study_uid": study.found.study_instance_uid,
        "server_name": server.name,
        "server_type": server.type,
        "size_bytes": sum(entry["size_bytes"] for entry in entries),
        "instances": entries,
    }
    return json.dumps(document, indent=1).encode()


def _payload(
    job: DownloadJob, study: _Study, outcome: Mapping[str, Any], *, overwrites_prevented: bool = True
) -> DownloadPayload:
    came = outcome["status"] == "downloaded"
    warnings = [] if study.pacs.keeps_bytes else ["server_rewrites_headers"]
    return DownloadPayload(
        job_id=study.attempt.job_id,
        server_name=study.pacs.server.name,
        server_type=study.pacs.server.type,
        study_uid=job.study_uid,
        destination=redact_url(job.destination),
        format=job.format,
        instances=len(study.series_of),
        size_bytes=sum(entry["size_bytes"] for entry in study.received.values()) if came else None,
        warnings=warned(warnings if overwrites_prevented else [*warnings, OVERWRITE_NOT_PREVENTED], study.not_asked),
        not_asked=list(study.not_asked),
        timings_ms=study.attempt.timings_ms,
        attempts=study.attempt.number,
        **outcome,
    )

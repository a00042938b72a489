"""What DCM4CHEE's answers to a store mean for an image, by the texts and codes that were seen on a running archive."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest
from urllib3 import HTTPResponse

from courier.settings import ServerSettings
from sandbox.synthetic import image, new_uid
from worker.dicom.instances import Instance, identify
from worker.pacs.dcm4chee import NOT_A_DICOM_FILE, Dcm4chee
from worker.pacs.protocol import Fate, Outcome, Part
from worker.pacs.transport import Request, Transport
from worker.pacs.warning_text import MOST_CHARACTERS, warning_text

CT = "1.2.840.10008.5.1.4.1.1.2"
FILE = Instance("1.1", "1.2", "1.3", CT, "1.2.840.10008.1.2.1")
EOF, NO_REASON = "java.io.EOFException", "java.lang.NullPointerException"


class FailureWire(Transport):
    """A transport that answers with one STOW response."""

    def __init__(self, failed: Sequence[dict[str, Any]], warning: str) -> None:
        super().__init__(ServerSettings(name="ward", type="dcm4chee", url="http://ward/aets/A/rs"), None)  # type: ignore[arg-type]
        self._body = json.dumps({"00081198": {"vr": "SQ", "Value": list(failed)}}).encode()
        self._warning = warning

    def _open(self, request: Request) -> Any:
        for _ in request.body or ():
            pass
        headers = {"Warning": f'299 dcm4chee-arc "{self._warning}"'} if self._warning else {}
        answer = HTTPResponse(io.BytesIO(self._body), headers, 409, preload_content=False)
        answer.reader = SimpleNamespace(deadline_s=0.0)  # type: ignore[attr-defined]
        return answer


def failed(reason: int, uid: str = "1.3", sop_class: str = CT) -> dict[str, Any]:
    return {
        "00081150": {"vr": "UI", "Value": [sop_class]},
        "00081155": {"vr": "UI", "Value": [uid]},
        "00081197": {"vr": "US", "Value": [reason]},
    }


def outcomes(
    *items: dict[str, Any], warning: str = NO_REASON, instances: Sequence[Instance] = (FILE,)
) -> list[Outcome]:
    parts = [Part(one, lambda: io.BytesIO(b"content"), 7) for one in instances]
    return Dcm4chee(FailureWire(items, warning)).store(parts)


def outcome(reason: int, warning: str = NO_REASON, *, sop_class: str = CT, instance: Instance = FILE) -> Outcome:
    (only,) = outcomes(failed(reason, sop_class=sop_class), warning=warning, instances=[instance])
    return only


# A778


def test_another_made_up_patient_id_is_no_conflict_of_the_sender() -> None:
    found = outcome(0xA778, instance=replace(FILE, has_patient_id=False))
    assert (found.fate, found.is_doubtful, found.failure_reason) == (Fate.TRY_AGAIN, False, 0xA778)


@pytest.mark.parametrize(
    ("reason", "instance"), [(0xA778, FILE), (0xA779, FILE), (0xA779, replace(FILE, has_patient_id=False))]
)
def test_a_patient_id_of_the_file_that_contradicts_the_study_is_one(reason: int, instance: Instance) -> None:
    assert outcome(reason, instance=instance).fate is Fate.CONFLICT


def test_the_text_of_a_conflict_names_the_patients_and_is_not_shown() -> None:
    found = outcome(0xA778, "Conflicting Patient ID: 4711^^^Hall Peter in Study")
    assert "Hall" not in found.message
    assert "4711" not in found.message


@pytest.mark.parametrize("value", ["", " ", None])
def test_a_file_without_patient_id_is_known_as_such(value: str | None) -> None:
    assert identify(io.BytesIO(image(new_uid()))).has_patient_id
    content = image(new_uid(), PatientID=value or "")
    if value is None:
        ds = pydicom.dcmread(io.BytesIO(content))
        del ds.PatientID
        file = io.BytesIO()
        ds.save_as(file)
        content = file.getvalue()
    assert not identify(io.BytesIO(content)).has_patient_id


# 272


@pytest.mark.parametrize(
    ("warning", "sop_class"),
    [
        (EOF, CT),
        (f"{EOF}: Unexpected end of stream", CT),
        (NO_REASON, NOT_A_DICOM_FILE),
        ("org.dcm4che3.io.DicomStreamException: Unexpected attribute (0000,0000)", CT),
    ],
)
def test_what_is_proven_unreadable_is_refused_at_once_with_the_text(warning: str, sop_class: str) -> None:
    found = outcome(272, warning, sop_class=sop_class)
    assert (found.fate, found.is_doubtful) == (Fate.REJECTED, False)
    text = warning_text(f'299 dcm4chee-arc "{warning}"')
    assert f"It says: {text}." in found.message


@pytest.mark.parametrize(
    ("warning", "sop_class"),
    [
        (NO_REASON, CT),
        ("No space left on configured storage systems", NOT_A_DICOM_FILE),
        ("java.nio.file.NoSuchFileException: /storage/fs1", NOT_A_DICOM_FILE),
        ("Storage fs1 not accessable", CT),
        ("jakarta.persistence.PersistenceException: duplicate key value violates unique constraint", CT),
        ("ARJUNA016053: Could not commit transaction.", CT),
    ],
)
def test_what_may_be_the_archives_trouble_is_tried_again(warning: str, sop_class: str) -> None:
    found = outcome(272, warning, sop_class=sop_class)
    assert (found.fate, found.is_doubtful) == (Fate.TRY_AGAIN, True)


def test_a_text_that_no_column_takes_is_refused_whatever_the_archive_says() -> None:
    found = outcome(272, "ARJUNA016053: Could not commit transaction.", instance=replace(FILE, odd_texts="StudyID"))
    assert found.fate is Fate.REJECTED
    assert "cannot store StudyID" in found.message
    assert "ARJUNA016053: Could not commit transaction." in found.message


@pytest.mark.parametrize(
    ("warning", "fate"),
    [
        (
            'JDBC exception executing SQL [select x] [ERROR: invalid byte sequence for encoding "UTF8": 0x00]',
            Fate.REJECTED,
        ),
        ("ERROR: value too long for type character varying(255)", Fate.REJECTED),
        ("", Fate.REJECTED),
        ("No space left on configured storage systems", Fate.TRY_AGAIN),
        (NO_REASON, Fate.TRY_AGAIN),
    ],
)
def test_an_odd_text_is_no_proof_where_the_archive_names_another_reason(warning: str, fate: Fate) -> None:
    assert outcome(272, warning, instance=replace(FILE, odd_texts="StudyID")).fate is fate


@pytest.mark.parametrize(
    ("warning", "fates"),
    [
        ("No space left on configured storage systems", [Fate.TRY_AGAIN] * 2),
        ("Unable to acquire JDBC Connection", [Fate.TRY_AGAIN] * 2),
        ("ARJUNA016053: Could not commit transaction.", [Fate.REJECTED] * 2),
        (EOF, [Fate.REJECTED] * 2),
        ("JDBC exception executing SQL: invalid byte sequence", [Fate.REJECTED] * 2),
    ],
)
def test_an_odd_text_is_no_proof_in_an_answer_that_names_trouble_of_the_archive(
    warning: str, fates: list[Fate]
) -> None:
    files = [replace(FILE, sop_instance_uid=uid, odd_texts="StudyID") for uid in ("1.3", "1.4")]
    files[1] = replace(files[1], odd_texts="" if warning == EOF else "StudyID")
    found = outcomes(*(failed(272, uid) for uid in ("1.3", "1.4")), warning=warning, instances=files)
    assert [one.fate for one in found] == fates


def test_the_text_explains_the_last_failure_alone() -> None:
    files = [replace(FILE, sop_instance_uid=uid) for uid in ("1.3", "1.4", "1.5")]
    found = outcomes(*(failed(272, uid) for uid in ("1.3", "1.4", "1.5")), warning=EOF, instances=files)
    assert [one.fate for one in found] == [Fate.TRY_AGAIN, Fate.TRY_AGAIN, Fate.REJECTED]
    assert [one.is_doubtful for one in found] == [True, True, False]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "keyword",
    [
        "PatientID",
        "PatientName",
        "AccessionNumber",
        "StudyDescription",
        "StudyID",
        "Modality",
        "Laterality",
        "AdmissionID",
        "PatientBirthDate",
        "ResponsiblePerson",
        "CompletionFlag",
        "VerificationFlag",
    ],
)
def test_texts_that_are_too_long_or_have_a_nul_are_known(keyword: str) -> None:
    contents = [image(new_uid(), **{keyword: value}) for value in ("x" * 255, "x" * 256, "a\0b", "ab\0")]
    assert [identify(io.BytesIO(one)).odd_texts for one in contents] == ["", keyword, keyword, ""]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("text", "odd"),
    [
        (["a", "b" * 300], ""),
        (["a" * 200, "b" * 200], ""),
        (["a", "b\0c"], ""),
        (["b\0c", "a"], "AccessionNumber"),
        (["a" * 256, "b"], "AccessionNumber"),
        (" " * 300 + "a", ""),
        ("a" + " " * 300, ""),
        ("a" + " " * 300 + "a", "AccessionNumber"),
    ],
)
def test_of_a_text_the_first_value_counts_without_the_blanks_around_it(text: str | list[str], odd: str) -> None:
    assert identify(io.BytesIO(image(new_uid(), AccessionNumber=text))).odd_texts == odd


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("length", "odd"), [(200, ""), (256, "StudyDescription")])
def test_the_length_of_a_text_is_counted_in_characters(length: int, odd: str) -> None:
    content = image(new_uid(), SpecificCharacterSet="ISO_IR 192", StudyDescription="é" * length)
    assert identify(io.BytesIO(content)).odd_texts == odd


# The header Warning


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("java.io.EOFException", "java.io.EOFException"),
        ("ARJUNA016053: Could not commit transaction.", "ARJUNA016053: Could not commit transaction"),
        ("Failing row contains (1, Hall^Peter, 19700101).", ""),
        ('For input string: "Hall"', "For input string: …"),
        ("value HALL too long", "value … too long"),
        ("com.hall.peter is not org.hall.Hall", "… is not …"),
        ("Key (pat_id)=(4711) already", "Key … already"),
        ("Hall4 19700101 4711\t\x00", ""),
    ],
)
def test_nothing_of_a_warning_is_shown_that_may_be_a_value_of_the_file(text: str, shown: str) -> None:
    found = warning_text(f'299 dcm4chee-arc "{text}"')
    assert found == shown


def test_a_warning_is_one_printable_line_of_bounded_length() -> None:
    found = warning_text('299 a "' + "value too long\n\x07 " * 1000 + '"')
    assert len(found) <= MOST_CHARACTERS
    assert found.isprintable()
    assert warning_text(None) == warning_text("299 a") == warning_text('299 a ""') == ""

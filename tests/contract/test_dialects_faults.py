"""What the two sandbox dialects do to us when they misbehave, and what we make of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pydicom
import pytest
from pydicom.uid import ImplicitVRLittleEndian

from courier.errors import CourierError, PacsMisanswered, PacsUnauthorized, PacsUnavailable
from courier.settings import AuthSettings, ServerSettings
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from worker.dicom.instances import identify
from worker.pacs.protocol import DeletionFate, Fate, Found, Outcome, Pacs, Part
from worker.pacs.registry import connect

DIALECTS = ("msdicom", "dcm4chee")
SetFault = Callable[..., None]


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pacs(sandbox: SandboxPart, dialect: str) -> Pacs:
    return ward(sandbox, dialect)


@pytest.fixture
def set_fault_here(sandbox: SandboxPart, dialect: str) -> SetFault:
    def set_fault(operation: str, **fields: Any) -> None:
        sandbox.set_fault(dialect, operation, **fields)

    return set_fault


def ward(sandbox: SandboxPart, dialect: str, **settings: Any) -> Pacs:
    defaults = {"name": "ward", "type": dialect, "url": getattr(sandbox, dialect), "read_timeout_s": 0.5}
    return connect(ServerSettings(**(defaults | settings)))


def part(content: bytes) -> Part:
    return Part(identify(io.BytesIO(content)), lambda: io.BytesIO(content), len(content))


def outcome(pacs: Pacs, content: bytes) -> Outcome:
    (only,) = pacs.store([part(content)])
    return only


def whole(pacs: Pacs, study: str) -> int:
    with pacs.retrieve(Found("study", study)) as parts:
        return sum(len(b"".join(one.chunks)) for one in parts)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"refuse": True}, PacsUnavailable),
        ({"hang": True}, PacsUnavailable),
        ({"status": 500}, PacsUnavailable),
        ({"status": 503, "retry_after_s": 9}, PacsUnavailable),
        ({"commit_then_drop": True}, PacsUnavailable),
        ({"truncate": True}, PacsMisanswered),
        ({"truncate": "cleanly"}, PacsMisanswered),
        ({"unauthorized": True}, PacsUnauthorized),
    ],
)
def test_a_study_that_is_there_is_never_taken_for_missing(
    pacs: Pacs, set_fault_here: SetFault, fields: dict[str, Any], kind: type[CourierError]
) -> None:
    study = new_uid()
    outcome(pacs, image(study))
    set_fault_here("query", **fields)
    with pytest.raises(kind) as error:
        pacs.find("study", study)
    assert getattr(error.value, "retry_after_s", None) == fields.get("retry_after_s")
    set_fault_here("query")
    assert len(pacs.find("study", study)) == 1


@pytest.mark.parametrize("fields", [{"commit_then_drop": True}, {"truncate": True}])
def test_a_push_whose_answer_is_lost_is_open_and_the_next_one_tells(
    pacs: Pacs, set_fault_here: SetFault, dialect: str, fields: dict[str, Any]
) -> None:
    study = new_uid()
    content = image(study)
    set_fault_here("store", times=1, **fields)
    with pytest.raises((PacsUnavailable, PacsMisanswered)):
        outcome(pacs, content)
    again = {"msdicom": Fate.ALREADY_THERE, "dcm4chee": Fate.STORED}[dialect]
    assert outcome(pacs, content).fate is again
    assert len(pacs.metadata(Found("study", study))) == 1


def test_a_connection_reset_while_we_push_is_unavailable(pacs: Pacs, set_fault_here: SetFault) -> None:
    set_fault_here("store", times=1, reset_after_bytes=100_000)
    content = image(new_uid(), side=1024)
    with pytest.raises(PacsUnavailable):
        outcome(pacs, content)
    assert outcome(pacs, content).fate is Fate.STORED


def test_the_part_that_the_answer_does_not_mention_is_not_stored(pacs: Pacs, set_fault_here: SetFault) -> None:
    study = new_uid()
    parts = [part(image(study)), part(image(study))]
    set_fault_here("store", times=2, lose_last_part=True)
    assert [each.fate for each in pacs.store(parts)] == [Fate.STORED, Fate.UNMENTIONED]
    assert [each.fate for each in pacs.store(parts[1:])] == [Fate.UNMENTIONED]
    assert [each.fate for each in pacs.store(parts[1:])] == [Fate.STORED]


@pytest.mark.parametrize("fields", [{"disk_full": "A700"}, {"disk_full": "272"}, {"transient_272": True}])
def test_a_server_without_room_is_tried_again(
    pacs: Pacs, set_fault_here: SetFault, dialect: str, fields: dict[str, Any]
) -> None:
    if (dialect, fields.get("disk_full")) == ("msdicom", "A700"):
        pytest.skip("MSDICOM has no such code")
    content = image(new_uid())
    set_fault_here("store", times=1, **fields)
    assert outcome(pacs, content).fate is Fate.TRY_AGAIN
    assert outcome(pacs, content).fate is Fate.STORED


def test_a_charset_behind_the_type_of_json_changes_nothing(pacs: Pacs, set_fault_here: SetFault) -> None:
    """Oddity: "The type of its JSON has a charset"."""
    set_fault_here("*", charset=True)
    study, content = new_uid(), image(new_uid(), PatientName="Müller^Zoë", SpecificCharacterSet="ISO_IR 192")
    assert outcome(pacs, content).fate is Fate.STORED
    assert outcome(pacs, image(study)).fate is Fate.STORED
    (found,) = pacs.find("study", study)
    assert len(pacs.metadata(found)) == 1
    assert study in str(pacs.studies(filters={"StudyInstanceUID": study}, limit=10, offset=0))


def test_a_retrieval_cut_in_the_middle_is_no_study(pacs: Pacs, set_fault_here: SetFault) -> None:
    study = new_uid()
    outcome(pacs, image(study))
    for truncate in (True, "cleanly"):
        set_fault_here("retrieve", times=1, truncate=truncate)
        with pytest.raises(PacsMisanswered):
            whole(pacs, study)
    assert whole(pacs, study) > 0


def test_a_store_left_behind_is_pending_until_it_is_deleted(sandbox: SandboxPart) -> None:
    msdicom, content = ward(sandbox, "msdicom"), image(new_uid())
    sandbox.set_fault("msdicom", "store", pending_45071="never", times=1)
    assert outcome(msdicom, content).fate is Fate.PENDING
    assert outcome(msdicom, content).fate is Fate.PENDING
    instance = part(content).instance
    assert msdicom.find("image", instance.sop_instance_uid) == []
    left = Found("image", instance.study_instance_uid, instance.series_instance_uid, instance.sop_instance_uid)
    assert msdicom.delete(left, permanent=True).fate is DeletionFate.DELETED
    assert outcome(msdicom, content).fate is Fate.STORED


def test_what_msdicom_stored_in_spite_of_is_told_without_values(sandbox: SandboxPart) -> None:
    msdicom = ward(sandbox, "msdicom")
    ds = pydicom.dcmread(io.BytesIO(image(new_uid(), PatientID="")))
    file = io.BytesIO()
    ds.save_as(file)
    told = outcome(msdicom, file.getvalue())
    assert told.fate is Fate.STORED
    assert told.warnings[0].startswith("PatientID (0010,0020)")


def test_what_is_encoded_with_implicit_vr_is_stored_with_a_warning(sandbox: SandboxPart) -> None:
    ds = pydicom.dcmread(io.BytesIO(image(new_uid())))
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, implicit_vr=True, little_endian=True)
    told = outcome(ward(sandbox, "msdicom"), file.getvalue())
    assert told.fate is Fate.STORED
    assert "implicit VR" in told.warnings[0]


def test_a_study_of_another_patient_is_a_conflict_on_dcm4chee(sandbox: SandboxPart) -> None:
    dcm4chee, study = ward(sandbox, "dcm4chee"), new_uid()
    assert outcome(dcm4chee, image(study)).fate is Fate.STORED
    conflict = outcome(dcm4chee, image(study, PatientName="Other^Name"))
    assert (conflict.fate, conflict.failure_reason) == (Fate.CONFLICT, 42872)
    assert "Other" not in conflict.message


TOKENS = {
    "msdicom": "{control}/entra/tenant/oauth2/v2.0/token",
    "dcm4chee": "{control}/keycloak/realms/dcm4che/protocol/openid-connect/token",
}


def with_account(sandbox: SandboxPart, dialect: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> Pacs:
    monkeypatch.setenv("WARD_SECRET", secret)
    auth = AuthSettings(
        type="oauth2",
        token_url=TOKENS[dialect].format(control=sandbox.control),
        client_id="courier",
        client_secret_env="WARD_SECRET",
        scope="https://dicom.healthcareapis.azure.com/.default" if dialect == "msdicom" else None,
    )
    return ward(sandbox, dialect, auth=auth)


def test_a_token_is_fetched_and_fetched_again_when_it_is_refused(
    sandbox: SandboxPart, dialect: str, set_fault_here: SetFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_fault_here("*", bearer=True)
    pacs = with_account(sandbox, dialect, "courier-secret", monkeypatch)
    assert outcome(pacs, image(new_uid())).fate is Fate.STORED
    set_fault_here("store", unauthorized=True)
    assert outcome(pacs, image(new_uid())).fate is Fate.STORED
    with pytest.raises(PacsUnauthorized):
        ward(sandbox, dialect).find("study", "1.2")


def test_a_wrong_secret_gets_no_token_and_is_not_told(
    sandbox: SandboxPart, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PacsUnauthorized) as error:
        with_account(sandbox, dialect, "swordfish", monkeypatch).find("study", "1.2")
    assert "swordfish" not in str(error.value.payload)


def test_a_database_that_is_down_is_told_by_the_call_that_touches_it(
    pacs: Pacs, set_fault_here: SetFault, dialect: str
) -> None:
    set_fault_here("*", database_down=True)
    assert pacs.database().ok is False
    state = pacs.state()
    assert state.ready is False
    assert dialect != "dcm4chee" or "/ctrl/status says STARTED; its database is in trouble" in state.note


def test_a_storage_that_cannot_be_opened_is_no_storage_of_zero_bytes(sandbox: SandboxPart) -> None:
    sandbox.set_fault("dcm4chee", "storage", storage_down=True)
    storage = ward(sandbox, "dcm4chee").storage()
    assert (storage.total_bytes, storage.free_bytes) == (None, None)
    assert "none can be opened" in storage.note


# The first image of a study of DCM4CHEE goes alone


def stored_at_once(sandbox: SandboxPart, pacs: Pacs, studies: list[str]) -> int:
    """The most stores that were at DCM4CHEE at once, of one image into each of ``studies``."""
    sandbox.set_fault("dcm4chee", "store", latency_ms=100)
    sandbox.load(anew=True)
    with ThreadPoolExecutor(len(studies)) as pool:
        fates = list(pool.map(lambda study: outcome(pacs, image(study, side=8)).fate, studies))
    assert fates == [Fate.STORED] * len(studies)
    return sandbox.load()["dcm4chee"]["most"]


def test_dcm4chee_gets_the_first_image_of_a_study_alone_and_the_others_together(sandbox: SandboxPart) -> None:
    pacs, study = ward(sandbox, "dcm4chee", read_timeout_s=30), new_uid()
    assert stored_at_once(sandbox, pacs, [study] * 2) == 1
    assert stored_at_once(sandbox, pacs, [study] * 4) > 1
    assert stored_at_once(sandbox, pacs, [new_uid() for _ in range(4)]) > 1

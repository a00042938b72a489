"""The application entities and rejection codes of a default dcm4chee-arc, and what each entity gets to see.

Constants and pure functions only. A view is a condition on the columns of `sandbox.store`'s instances: `rejection`
holds the code an instance was rejected with (``113039^DCM``), or ``note:`` and a code for the Key Object that
a rejection leaves in the study.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOTE = "note:"


@dataclass(frozen=True)
class RejectionCode:
    """One row of ``GET /reject``. ``on_restow`` is what a store of such an instance does: IGNORE, REJECT, RESTORE."""

    code_value: str
    coding_scheme_designator: str
    label: str
    type: str
    code_meaning: str
    on_restow: str
    replaces: frozenset[str]

    @property
    def code(self) -> str:
        return f"{self.code_value}^{self.coding_scheme_designator}"

    def as_item(self) -> dict[str, Any]:
        """As an item of a code sequence in DICOM JSON."""
        return {
            "00080100": {"vr": "SH", "Value": [self.code_value]},
            "00080102": {"vr": "SH", "Value": [self.coding_scheme_designator]},
            "00080104": {"vr": "LO", "Value": [self.code_meaning]},
        }

    def as_json(self) -> dict[str, str]:
        return {
            "label": self.label,
            "type": self.type,
            "codeValue": self.code_value,
            "codingSchemeDesignator": self.coding_scheme_designator,
            "codeMeaning": self.code_meaning,
        }


def _code(value: str, label: str, kind: str, meaning: str, on_restow: str, replaces: tuple[str, ...]) -> RejectionCode:
    return RejectionCode(value, "DCM", label, kind, meaning, on_restow, frozenset(f"{r}^DCM" for r in replaces))


QUALITY, PATIENT_SAFETY, WRONG_MWL, EXPIRED = "113001^DCM", "113037^DCM", "113038^DCM", "113039^DCM"
REVOKE = RejectionCode(
    "REVOKE_REJECTION",
    "99DCM4CHEE",
    "Revoke Rejection",
    "REVOKE_REJECTION",
    "Restore rejected Instances",
    "",
    frozenset({QUALITY, PATIENT_SAFETY, WRONG_MWL, EXPIRED}),
)
_CODES = (
    _code("113001", "Quality", "REJECTED_FOR_QUALITY_REASONS", "Rejected for Quality Reasons", "IGNORE", ()),
    _code(
        "113037",
        "Patient Safety",
        "REJECTED_FOR_PATIENT_SAFETY_REASONS",
        "Rejected for Patient Safety Reasons",
        "REJECT",
        ("113001",),
    ),
    _code(
        "113038",
        "Incorrect MWL Entry",
        "INCORRECT_MODALITY_WORKLIST_ENTRY",
        "Incorrect Modality Worklist Entry",
        "REJECT",
        ("113001", "113037"),
    ),
    _code(
        "113039",
        "Retention Expired",
        "DATA_RETENTION_POLICY_EXPIRED",
        "Data Retention Policy Expired",
        "RESTORE",
        ("113001", "113037", "113038"),
    ),
)
REJECTION_CODES = {code.code: code for code in sorted(_CODES, key=lambda code: code.label)}

_NOTES_SHOWN = f"('{NOTE}{QUALITY}', '{NOTE}{PATIENT_SAFETY}', '{NOTE}{WRONG_MWL}')"
_REGULAR = f"rejection IS NULL OR rejection IN {_NOTES_SHOWN}"


def _only(code: str) -> str:
    return f"rejection = '{code}'"


@dataclass(frozen=True)
class ApplicationEntity:
    """One AE: what it is for, what it sees (SQL), and which web services it offers."""

    title: str
    description: str
    view: str
    services: frozenset[str]
    hides_not_rejected: bool = False

    @property
    def returns_as_received(self) -> bool:
        """Whether retrieved objects are the bytes that were stored; DCM4CHEE lays its database over them."""
        return self.title != "DCM4CHEE"


#: The one that takes images: all entities name it as the RetrieveAETitle.
STORED_BY = "DCM4CHEE"
_READS = frozenset({"WADO_RS", "QIDO_RS", "QIDO_COUNT", "DCM4CHEE_ARC_AET"})
APPLICATION_ENTITIES = {
    ae.title: ae
    for ae in (
        ApplicationEntity(
            "DCM4CHEE", "Hide instances rejected for any reason", _REGULAR, _READS | {"STOW_RS", "MPPS_RS"}
        ),
        ApplicationEntity(
            "AS_RECEIVED",
            "Retrieve instances as received",
            "TRUE",
            _READS,
        ),
        ApplicationEntity(
            "IOCM_REGULAR_USE",
            "Show instances rejected for Quality Reasons",
            f"{_REGULAR} OR {_only(QUALITY)} OR {_only(NOTE + EXPIRED)}",
            _READS,
        ),
        ApplicationEntity(
            "IOCM_QUALITY", "Only show instances rejected for Quality Reasons", _only(QUALITY), _READS, True
        ),
        ApplicationEntity(
            "IOCM_PAT_SAFETY",
            "Only show instances rejected for Patient Safety Reasons",
            _only(PATIENT_SAFETY),
            _READS,
            True,
        ),
        ApplicationEntity(
            "IOCM_WRONG_MWL",
            "Only show instances rejected for Incorrect Modality Worklist Entry",
            _only(WRONG_MWL),
            _READS,
            True,
        ),
        ApplicationEntity(
            "IOCM_EXPIRED",
            "Only show instances rejected for Data Retention Expired",
            _only(EXPIRED),
            _READS,
            True,
        ),
        ApplicationEntity("WORKLIST", "Modality Worklist", _REGULAR, frozenset({"UPS_RS", "MWL_RS"})),
    )
}

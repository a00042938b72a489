"""The archive's other forms of a DICOM JSON dataset: Native DICOM Model (PS3.19 A.1) and CSV.

Pure text; says nothing about when which form is used.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree as Xml

from sandbox.dcm4chee.archive import keyword

_NAMESPACE = "http://dicom.nema.org/PS3.19/models/NativeDICOM"
_PERSON = ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")


def native_xml(dataset: dict[str, Any]) -> bytes:
    root = Xml.Element("NativeDicomModel", {"xml:space": "preserve"})
    _fill(root, dataset)
    return bytes(Xml.tostring(root, encoding="UTF-8", xml_declaration=True))


def _fill(parent: Xml.Element, dataset: dict[str, Any]) -> None:
    for tag, element in dataset.items():
        name = keyword(tag)
        attributes = {"tag": tag, "vr": element["vr"]} | ({} if name == tag else {"keyword": name})
        child = Xml.SubElement(parent, "DicomAttribute", attributes)
        if "BulkDataURI" in element:
            Xml.SubElement(child, "BulkData", {"uri": element["BulkDataURI"]})
        if "InlineBinary" in element:
            Xml.SubElement(child, "InlineBinary").text = element["InlineBinary"]
        for number, value in enumerate(element.get("Value", ()), 1):
            _value(child, element["vr"], number, value)


def _value(child: Xml.Element, vr: str, number: int, value: Any) -> None:
    if vr == "SQ":
        _fill(Xml.SubElement(child, "Item", {"number": str(number)}), value)
    elif vr == "PN" and value:
        person = Xml.SubElement(child, "PersonName", {"number": str(number)})
        for group, name in value.items():
            components = Xml.SubElement(person, group)
            for component, text in zip(_PERSON, name.split("^"), strict=False):
                if text:
                    Xml.SubElement(components, component).text = text
    elif value is not None:
        Xml.SubElement(child, "Value", {"number": str(number)}).text = str(value)


def csv_text(rows: Sequence[dict[str, Any]], delimiter: str = ",") -> str:
    """A header line of keywords, then one line per row; every field quoted; sequences are left out."""
    tags = sorted({tag for row in rows for tag, element in row.items() if element["vr"] != "SQ"})
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow([keyword(tag) for tag in tags])
    writer.writerows([[_cell(row.get(tag)) for tag in tags] for row in rows])
    return text.getvalue()


def _cell(element: dict[str, Any] | None) -> str:
    values = (element or {}).get("Value", ())
    return "\\".join(
        "=".join(value.values()) if isinstance(value, dict) else "" if value is None else str(value) for value in values
    )

"""Where downloads go: one module per scheme, chosen here by the URL, and only to places that the settings name.

No DICOM and no PACS here. A destination shows a download only when it is whole, and never lays it over something else.
"""

from __future__ import annotations

import re

from courier import extras
from courier.ledger.breakers import Breakers
from courier.settings import DownloadSettings, places_of
from worker.storage.azure_destination import AzureDestinations
from worker.storage.folder_destination import FolderDestinations
from worker.storage.network import NO_PROXY, Network
from worker.storage.s3_destination import S3Destinations
from worker.storage.study_marks import Archive, Files, Records, StudyFingerprint, refusal

__all__ = ["Archive", "Destinations", "Files", "Records", "StudyFingerprint"]

_Family = FolderDestinations | S3Destinations | AzureDestinations
_NEEDED = {"s3": extras.S3, "az": extras.AZURE_BLOBS}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,15}):").match


class Destinations:
    """Every place a worker may write to, behind one door; shared by all threads."""

    def __init__(
        self,
        settings: DownloadSettings,
        records: Records | None = None,
        network: Network = NO_PROXY,
        breakers: Breakers | None = None,
    ) -> None:
        """``records`` is what all workers know of stores; without it each process finds out by itself. ``breakers``
        are what they know of credentials that stores refuse.
        """
        self._settings = settings
        self._s3 = S3Destinations(settings, records, network, breakers)
        self._by_scheme: dict[str, _Family] = {
            "file": FolderDestinations(settings),
            "s3": self._s3,
            "az": AzureDestinations(settings, network, breakers),
        }

    def archive(self, url: str) -> Archive:
        """The one file that ``url`` names; `InvalidRequest` if nothing may be written there."""
        return self._chosen(url).archive(url)

    def files(self, url: str) -> Files:
        """The folder (or prefix) that ``url`` names; `InvalidRequest` if nothing may be written there."""
        return self._chosen(url).files(url)

    @property
    def places(self) -> list[str]:
        """The folders, buckets and containers of the settings, as URLs; those without a wildcard in their names."""
        return places_of(self._settings)

    def probe(self, place: str) -> bool:
        """Write a probe to one of the `places`, and remove it; whether the store prevents that it is overwritten.

        Raises
        ------
        InvalidRequest, SourceUnreachable
            It cannot be written.
        """
        return self._chosen(place).probe(place)

    def _chosen(self, url: str) -> _Family:
        match = _SCHEME(url)
        scheme = match[1].lower() if match else ""
        needed = _NEEDED.get(scheme)
        if needed is not None and not needed.is_installed:
            raise refusal(f"This worker writes to no {scheme}:// URLs: {needed.remedy}.", "not_allowed")
        chosen = self._by_scheme.get(scheme)
        if chosen is None:
            spoken = ", ".join(self._by_scheme)
            sentence = f"Downloads are written to {spoken}; this destination starts with none of them."
            raise refusal(sentence, "not_allowed")
        return chosen

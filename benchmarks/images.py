"""Synthetic images with fresh UIDs, and a lean HTTP server that hands them out from memory.

``python -m benchmarks.images`` serves ``/STUDY/NUMBER.dcm`` (40 KB) and ``/huge/BYTES.dcm`` on a free loopback port
and prints its base URL. Nothing here measures.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator

from pydicom import Dataset, FileMetaDataset, dcmread
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from sandbox.samples import sample_bytes


def _sample() -> bytes:
    """The CT without the other IDs of its patient: DCM4CHEE takes all who have one of them for one patient."""
    ds = dcmread(io.BytesIO(sample_bytes("CT_small.dcm")))
    del ds.OtherPatientIDsSequence
    file = io.BytesIO()
    ds.save_as(file)
    return file.getvalue()


_CT = _sample()
_TAIL = b".20040119072730.12322"
_ZEROS = bytes(1 << 20)


def image(study: int, number: int) -> bytes:
    """A 40 KB CT: same ``study``, same Study Instance UID; every pair a SOP Instance UID of its own."""
    fresh = _CT
    for root in (b"1.3.6.1.4.1.5962.1.2.1", b"1.3.6.1.4.1.5962.1.3.1.1"):
        fresh = fresh.replace(root + _TAIL, root + b".2%013d.10000" % study)
    root = b"1.3.6.1.4.1.5962.1.1.1.1.1"
    fresh = fresh.replace(root + _TAIL, root + b".2%013d.%05d" % (study, 10_000 + number))
    return fresh.replace(b"1CT1", b"%04d" % (study % 10_000))


def huge_image(size_bytes: int) -> Iterator[bytes]:
    """A CT whose pixel data is ``size_bytes`` of zeros, in pieces."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = CTImageStorage
    uid = f"1.2.826.0.1.3680043.10.1337.{size_bytes}"
    ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{uid}.1", f"{uid}.2", f"{uid}.3"
    ds.PatientID, ds.PatientName, ds.Modality = "HUGE", "Huge^Image", "CT"
    ds.Rows = ds.Columns = 16_384
    ds.NumberOfFrames = size_bytes // (2 * 16_384 * 16_384)
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 15, 0, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    head = io.BytesIO()
    ds.save_as(head, enforce_file_format=True)
    yield head.getvalue() + b"\xe0\x7f\x10\x00OW\x00\x00" + size_bytes.to_bytes(4, "little")
    for sent in range(0, size_bytes, len(_ZEROS)):
        yield _ZEROS[: size_bytes - sent]


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            request = await reader.readuntil(b"\r\n\r\n")
            _, folder, name = request.split(b" ", 2)[1].split(b"/")
            number = int(name.removesuffix(b".dcm"))
            if folder == b"huge":
                length = number + len(next(huge_image(number)))
                pieces: Iterator[bytes] = huge_image(number)
            else:
                body = image(int(folder), number)
                length, pieces = len(body), iter([body])
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom\r\nContent-Length: %d\r\n\r\n" % length)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _serve() -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())

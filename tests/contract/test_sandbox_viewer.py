"""The pages that show a stored study: the sandbox's own, and OHIF's where it has been fetched (``make viewer``)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import requests
from PIL import Image
from playwright.sync_api import sync_playwright
from pydicom.data import get_testdata_file

from sandbox import ohif, pictures, synthetic
from sandbox import processes as parts
from sandbox.processes import Processes, SandboxPart
from sandbox.synthetic import image, new_uid
from tests.missing import missing
from tests.real_archive import only_the_sandbox

DIALECTS = ["msdicom", "dcm4chee"]
SITE = Path(__file__).parents[2] / ".run" / "ohif"
CHROMIUM = Path("/usr/bin/chromium")
#: WebGL without a graphics card.
SOFTWARE_WEBGL = [
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
]


def store(part: SandboxPart, dialect: str, *objects: bytes) -> None:
    body = b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n" + one + b"\r\n" for one in objects) + b"--b--\r\n"
    headers = {
        "Content-Type": 'multipart/related; type="application/dicom"; boundary=b',
        "Accept": "application/dicom+json",
    }
    answer = requests.post(f"{getattr(part, dialect)}/studies", data=body, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text


def sample(name: str, study: str, **keywords: Any) -> bytes:
    path = get_testdata_file(name)
    assert isinstance(path, str)
    ds = pydicom.dcmread(path)
    ds.StudyInstanceUID = study
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = new_uid()
    ds.PatientID, ds.PatientName, ds.PatientBirthDate = synthetic.PATIENT_ID, "Synthetic^Square", "19700101"
    for keyword, value in keywords.items():
        setattr(ds, keyword, value)
    content = io.BytesIO()
    ds.save_as(content, enforce_file_format=True)
    return content.getvalue()


def study_page(part: SandboxPart, dialect: str, study: str) -> str:
    only_the_sandbox(f"shows what is on its own {dialect.upper()}", dialect)
    answer = requests.get(part.viewer(dialect).format(study=study), timeout=20)
    assert answer.status_code == 200
    return answer.text


def picture_links(page: str) -> list[str]:
    return re.findall(r'src="([^"]+\.png)"', page)


def picture(part: SandboxPart, link: str) -> Any:
    """The pixels of a picture of a page."""
    answer = requests.get(part.control + link, timeout=20)
    assert answer.headers["Content-Type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_page_shows_each_image_of_a_study_and_its_attributes(sandbox: SandboxPart, dialect: str) -> None:
    study = new_uid()
    store(sandbox, dialect, image(study, InstanceNumber=1, StudyDescription="Two <squares>"), image(study, seed=7))
    page = study_page(sandbox, dialect, study)
    assert "a tool for development" in page
    assert "Synthetic Square" in page
    assert "Two &lt;squares&gt;" in page
    assert study in page
    links = picture_links(page)
    assert len(links) == 2
    for link in links:
        pixels = picture(sandbox, link)
        assert pixels.shape == (64, 64)
        # A diagonal ramp from black to white, as the pixels are.
        assert (pixels[0, 0], pixels[-1, -1]) == (0, 255)
        assert (np.diff(pixels[0].astype(int)) >= 0).all()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_image_s_own_page_lists_every_attribute(sandbox: SandboxPart, dialect: str) -> None:
    study = new_uid()
    store(sandbox, dialect, sample("CT_small.dcm", study))
    (link,) = set(re.findall(rf'href="(/viewer/{dialect}/instances/\d+)"', study_page(sandbox, dialect, study)))
    page = requests.get(sandbox.control + link, timeout=20).text
    for text in ("CT Image Storage", "Transfer Syntax UID", "(0018,0050)", "Slice Thickness", "Pixel Spacing"):
        assert text in page
    assert f"/viewer/{dialect}/study?StudyInstanceUIDs={study}" in page


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("CT_small.dcm", (128, 128)),
        ("image_dfl.dcm", (320, 320)),
        ("JPEG2000.dcm", (320, 80)),
        ("MR_small_RLE.dcm", (64, 64)),
        ("SC_rgb_jpeg_dcmtk.dcm", (100, 100, 3)),
        ("examples_palette.dcm", (140, 320, 3)),
    ],
)
def test_pictures_of_every_common_kind_are_rendered(sandbox: SandboxPart, name: str, shape: tuple[int, ...]) -> None:
    study = new_uid()
    store(sandbox, "dcm4chee", sample(name, study))
    pixels = picture(sandbox, picture_links(study_page(sandbox, "dcm4chee", study))[0])
    assert pixels.shape == shape
    assert pixels.min() < 60
    assert pixels.max() > 180


def test_a_multi_frame_image_shows_its_first_frames(sandbox: SandboxPart) -> None:
    study = new_uid()
    frames = np.stack([np.full((8, 8), number * 9, dtype="<u2") for number in range(10)])
    ten = image(study, side=8, NumberOfFrames=10)
    ds = pydicom.dcmread(io.BytesIO(ten))
    ds.PixelData = frames.tobytes()
    content = io.BytesIO()
    ds.save_as(content)
    store(sandbox, "dcm4chee", content.getvalue())
    page = study_page(sandbox, "dcm4chee", study)
    assert len(picture_links(page)) == 6
    assert "frame 6 of 10" in page


def test_what_has_no_picture_says_why(sandbox: SandboxPart) -> None:
    study = new_uid()
    unknown = pydicom.dcmread(io.BytesIO(sample("JPEG2000.dcm", study)))
    unknown.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    content = io.BytesIO()
    unknown.save_as(content)
    broken = pydicom.dcmread(io.BytesIO(sample("JPEG2000.dcm", study)))
    broken.SOPInstanceUID = broken.file_meta.MediaStorageSOPInstanceUID = new_uid()
    broken.PixelData = pydicom.encaps.encapsulate([b"no codestream at all"])
    ruined = io.BytesIO()
    broken.save_as(ruined)
    store(sandbox, "dcm4chee", sample("reportsi.dcm", study), content.getvalue(), ruined.getvalue())
    page = study_page(sandbox, "dcm4chee", study)
    assert "has no pixels." in page
    assert "There is no decoder here for MPEG2 Main Profile" in page
    (link,) = picture_links(page)
    drawing = requests.get(sandbox.control + link, timeout=20)
    assert drawing.headers["Content-Type"].startswith("image/svg+xml")
    assert "cannot be decoded" in drawing.text


def test_a_study_that_is_not_there_is_said_so(sandbox: SandboxPart) -> None:
    for query, status in ((f"?StudyInstanceUIDs={new_uid()}", 404), ("", 400)):
        answer = requests.get(f"{sandbox.control}/viewer/msdicom{query}", timeout=10)
        assert answer.status_code == status
        assert "<h1>" in answer.text
    assert requests.get(f"{sandbox.control}/viewer/other?StudyInstanceUIDs=1.2", timeout=10).status_code == 404


def test_a_rejected_image_is_not_shown(sandbox: SandboxPart) -> None:
    study = new_uid()
    store(sandbox, "dcm4chee", image(study))
    requests.post(f"{sandbox.dcm4chee}/studies/{study}/reject/113039%5EDCM", timeout=10)
    assert requests.get(sandbox.viewer("dcm4chee").format(study=study), timeout=10).status_code == 404


def test_a_window_beside_all_values_does_not_make_a_black_square(tmp_path: Path) -> None:
    path = tmp_path / "window.dcm"
    path.write_bytes(image(new_uid(), WindowCenter=30000, WindowWidth=10))
    extrema = pictures.render(path).getextrema()
    assert extrema == (0, 255)


def test_monochrome1_is_shown_the_other_way_round(tmp_path: Path) -> None:
    path = tmp_path / "inverse.dcm"
    path.write_bytes(image(new_uid(), PhotometricInterpretation="MONOCHROME1"))
    picture = pictures.render(path)
    assert (picture.getpixel((0, 0)), picture.getpixel((63, 63))) == (255, 0)


# -- OHIF ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxPart]:
    """A sandbox that serves a stand-in for OHIF's site: what matters here is who answers which address."""
    site = tmp_path_factory.mktemp("site")
    (site / "index.html").write_text("<title>a site</title>")
    (site / "app.bundle.js").write_text("let it = 'be';")
    (site / "app-config.js").write_text("not this one")
    (site.parent / "secret.txt").write_text("not part of the site")
    with Processes(tmp_path_factory.mktemp("sandbox-with-ohif")) as running:
        yield parts.sandbox(running, name="sandbox-with-site", ohif=site)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_viewer_link_leads_to_ohif_when_it_is_there(with_site: SandboxPart, dialect: str) -> None:
    study = new_uid()
    store(with_site, dialect, image(study))
    answer = requests.get(with_site.viewer(dialect).format(study=study), timeout=10)
    assert answer.url == f"{with_site.control}/ohif/viewer/{dialect}?StudyInstanceUIDs={study}"
    assert "a site" in answer.text
    own = requests.get(f"{with_site.control}/viewer/{dialect}/study?StudyInstanceUIDs={study}", timeout=10)
    assert "a tool for development" in own.text


def test_the_site_and_its_configuration_are_served(with_site: SandboxPart) -> None:
    assert requests.get(f"{with_site.control}/app.bundle.js", timeout=10).text == "let it = 'be';"
    config = requests.get(f"{with_site.control}/app-config.js", timeout=10).text
    for text in ('"sourceName": "msdicom"', '"sourceName": "dcm4chee"', '"/v2"', '"/dcm4chee-arc/aets/DCM4CHEE/rs"'):
        assert text in config
    assert requests.get(f"{with_site.control}/no-such-file.js", timeout=10).status_code == 404
    assert requests.get(f"{with_site.control}/..%2Fsecret.txt", timeout=10).status_code == 404
    assert requests.get(f"{with_site.control}/healthz", timeout=10).json()["status"] == "ok"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dicomweb_answers_under_the_site_s_origin_with_urls_that_lead_back_there(
    with_site: SandboxPart, dialect: str
) -> None:
    study, sop = new_uid(), new_uid()
    root = {"msdicom": "/v2", "dcm4chee": "/dcm4chee-arc/aets/DCM4CHEE/rs"}[dialect]
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + image(study, sop=sop) + b"\r\n--b--\r\n"
    headers = {
        "Content-Type": 'multipart/related; type="application/dicom"; boundary=b',
        "Accept": "application/dicom+json",
    }
    answer = requests.post(f"{with_site.control}{root}/studies", data=body, headers=headers, timeout=10)
    assert answer.status_code == 200, answer.text
    url = answer.json()["00081199"]["Value"][0]["00081190"]["Value"][0]
    assert url.startswith(with_site.control + root)
    frame = requests.get(
        f"{url}/frames/1", headers={"Accept": 'multipart/related; type="application/octet-stream"'}, timeout=10
    )
    assert frame.status_code == 200
    assert len(frame.content) > 64 * 64 * 2
    with_site.set_fault(dialect, "query", status=503, retry_after_s=3, times=1)
    answer = requests.get(f"{with_site.control}{root}/studies", timeout=10)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "3")


@pytest.fixture
def ohif_site() -> Path:
    if not CHROMIUM.exists():
        missing("Chromium is not installed (Debian package chromium)")
    if not ohif.is_site(SITE):
        missing("OHIF has not been fetched (make viewer, which needs npm)")
    return SITE


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.timeout(240)
def test_ohif_draws_a_study_of_either_dialect(ohif_site: Path, tmp_path: Path) -> None:
    study = new_uid()
    with Processes(tmp_path / "parts") as running, sync_playwright() as playwright:
        part = parts.sandbox(running, name="sandbox-with-ohif", ohif=ohif_site)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SOFTWARE_WEBGL)
        for dialect in DIALECTS:
            store(part, dialect, sample("CT_small.dcm", study), sample("JPEG2000.dcm", study))
            page = browser.new_page(viewport={"width": 1200, "height": 800})
            page.goto(part.viewer(dialect).format(study=study))
            canvas = page.wait_for_selector("canvas", timeout=90_000)
            assert canvas is not None
            drawn = False
            for _look in range(120):
                shot = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("L"))
                # The slice fills the middle with many shades; an empty canvas has one, and OHIF's texts a few.
                height, width = shot.shape
                middle = shot[height // 3 : height * 2 // 3, width // 3 : width * 2 // 3]
                drawn = len(np.unique(middle)) > 60 and float(middle.std()) > 10
                if drawn:
                    break
                page.wait_for_timeout(250)
            assert drawn, f"OHIF's canvas stayed empty for {dialect}"
            page.close()
        browser.close()

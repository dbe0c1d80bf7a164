"""DICOM: a folder of one series is the scan it was written from, in the patient's own space; a radiograph keeps its contrast."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from smae_utils.errors import UserError
from smae_utils.reading import ReadScan, read_image

pydicom = pytest.importorskip("pydicom", reason="pydicom, of the dicom extra, is not installed")


def write_slice(path: Path, pixels: np.ndarray, number: int, series: str, spacing=(2.0, 3.0, 4.0), photometric="MONOCHROME2", **more) -> None:
    """One slice: rows run to the patient's back (+y of DICOM), columns to the left (+x), slices to the head (+z)."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = CTImageStorage, generate_uid(), ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID, file.SeriesInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID, series
    file.Modality, file.PatientID, file.InstanceNumber = "CT", "p", number
    file.Rows, file.Columns = pixels.shape
    file.PixelSpacing, file.SliceThickness = [spacing[1], spacing[0]], spacing[2]
    file.ImageOrientationPatient, file.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-10.0, -20.0, -30.0 + spacing[2] * (number - 1)]
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, photometric, 1
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    file.RescaleSlope, file.RescaleIntercept = 1, more.get("intercept", 0)
    file.PixelData = pixels.astype(np.int16).tobytes()
    file.save_as(path, enforce_file_format=True)


def test_a_series_is_read_in_the_patients_space_and_in_hu(tmp_path):
    from pydicom.uid import generate_uid

    rng = np.random.default_rng(0)
    stored, series = rng.integers(0, 2000, (5, 6, 7)), generate_uid()  # slices, rows, columns
    folder = tmp_path / "series"
    folder.mkdir()
    for number in (3, 1, 5, 2, 4):  # files in no order
        write_slice(folder / f"{number * 7 % 11}.dcm", stored[number - 1], number, series, intercept=-1024)
    image = ReadScan(["image"])({"image": str(folder)})["image"]
    ras = nib.as_closest_canonical(nib.Nifti1Image(image.as_tensor().numpy()[0], np.asarray(image.affine)))
    assert tuple(np.round(ras.header.get_zooms(), 4)) == (2.0, 3.0, 4.0)
    # DICOM's x grows to the left and y to the back; RAS the other way on both.
    np.testing.assert_array_equal(np.asarray(ras.dataobj), stored.transpose(2, 1, 0)[::-1, ::-1] - 1024)
    corner = nib.affines.apply_affine(np.linalg.inv(ras.affine), [10.0, 20.0, -30.0])  # the first voxel's place, in RAS
    np.testing.assert_allclose(corner, [6, 5, 0], atol=1e-4)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_radiograph_is_turned_so_that_bone_is_bright(photometric, tmp_path):
    pixels = np.arange(48).reshape(6, 8) * 50
    write_slice(tmp_path / "x.dcm", pixels, 1, "1.2.3", photometric=photometric)
    grey = np.asarray(read_image(str(tmp_path / "x.dcm")))
    assert grey.shape == (6, 8) and grey.dtype == np.uint8
    assert (grey[0, 0] < grey[-1, -1]) == (photometric == "MONOCHROME2")


def test_16_bit_images_keep_their_range(tmp_path):
    pixels = (np.arange(64).reshape(8, 8) * 60).astype(np.uint16)  # 12 bit in 16: a plain conversion would clip nearly all of it
    Image.fromarray(pixels).save(tmp_path / "x.png")
    grey = np.asarray(read_image(str(tmp_path / "x.png"))).astype(int)
    assert len(np.unique(grey)) == 64 and np.abs(grey - pixels / pixels.max() * 255).max() <= 1


@pytest.mark.parametrize("content", [b"", b"no dicom"])
def test_files_that_are_no_dicom_are_named(content, tmp_path):
    (tmp_path / "x.dcm").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*x\.dcm"):
        read_image(str(tmp_path / "x.dcm"))


def test_a_dicom_folder_is_predicted_in_its_own_space(btcv, tiny, bare, tmp_path):
    from smae_utils.predict import predict
    from smae_utils.training import finetune

    run = finetune("btcv", btcv, tmp_path / "run", preset=bare, overrides={**tiny["btcv", "finetune"], "steps": 1}, report=[].append)
    folder = tmp_path / "series"
    folder.mkdir()
    stored = np.random.default_rng(0).integers(0, 300, (12, 20, 24))
    for number in range(1, 13):
        write_slice(folder / f"{number}.dcm", stored[number - 1], number, "1.2.3.4", spacing=(8.0, 8.0, 10.0))
    predict(run.path, [folder], tmp_path / "out", report=[].append)
    mask = nib.load(tmp_path / "out" / "series.nii.gz")
    image = ReadScan(["image"])({"image": str(folder)})["image"]
    assert mask.shape == tuple(image.shape[1:])
    np.testing.assert_allclose(mask.affine, np.asarray(image.affine), atol=1e-5)
    assert mask.header.get_xyzt_units()[0] == "mm"

"""DICOM: a folder of one series is the scan it was written from, in the patient's own space; a radiograph
keeps its contrast.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from smae_utils.data.reading import ReadScan, read_image
from smae_utils.errors import UserError

pydicom = pytest.importorskip("pydicom", reason="pydicom, of the dicom extra, is not installed")


def write_slice(
    path: Path,
    pixels: np.ndarray,
    number: int,
    series: str,
    spacing=(2.0, 3.0, 4.0),
    photometric="MONOCHROME2",
    **more,
) -> None:
    """One slice: rows run to the patient's back (+y of DICOM), columns to the left (+x), slices to the head
    (+z).
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = (
        CTImageStorage,
        generate_uid(),
        ExplicitVRLittleEndian,
    )
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID, file.SeriesInstanceUID = (
        CTImageStorage,
        meta.MediaStorageSOPInstanceUID,
        series,
    )
    file.Modality, file.PatientID, file.InstanceNumber = "CT", "p", number
    file.Rows, file.Columns = pixels.shape
    file.PixelSpacing, file.SliceThickness = [spacing[1], spacing[0]], spacing[2]
    file.ImageOrientationPatient, file.ImagePositionPatient = (
        [1, 0, 0, 0, 1, 0],
        [-10.0, -20.0, -30.0 + spacing[2] * (number - 1)],
    )
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, photometric, 1
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    file.RescaleSlope, file.RescaleIntercept = 1, more.pop("intercept", 0)
    file.PixelData = pixels.astype(np.int16).tobytes()
    for name, value in more.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)


STORED = np.random.default_rng(1).integers(0, 2000, (6, 5, 7))  # slices, rows, columns


def write_series(
    folder: Path, series: str = "1.2.3", places=range(6), numbers=None, names="IM{:03d}", **more
) -> Path:
    """A slice at each of `places` (4 mm apart), whose number in the series is its place unless `numbers` says
    otherwise.
    """
    folder.mkdir(exist_ok=True)
    for i, place in enumerate(places):
        position = more.get("position", lambda place: [-10.0, -20.0, -30.0 + 4 * place])(place)
        rest = {k: v(place) if callable(v) else v for k, v in more.items() if k != "position"}
        write_slice(
            folder / names.format(i),
            STORED[place % 6],
            numbers[i] if numbers else place,
            series,
            ImagePositionPatient=position,
            **rest,
        )
    return folder


def values_at_places(folder: str | Path) -> np.ndarray:
    """(6, 5, 7) what was read, in the order of the slices' places."""
    image = ReadScan(["image"])({"image": str(folder)})["image"]
    ras = nib.as_closest_canonical(nib.Nifti1Image(image.as_tensor().numpy()[0], np.asarray(image.affine)))
    return np.asarray(ras.dataobj)[::-1, ::-1].transpose(2, 1, 0)


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
    # The first voxel's place, in RAS.
    corner = nib.affines.apply_affine(np.linalg.inv(ras.affine), [10.0, 20.0, -30.0])
    np.testing.assert_allclose(corner, [6, 5, 0], atol=1e-4)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_radiograph_is_turned_so_that_bone_is_bright(photometric, tmp_path):
    pixels = np.arange(48).reshape(6, 8) * 50
    write_slice(tmp_path / "x.dcm", pixels, 1, "1.2.3", photometric=photometric)
    grey = np.asarray(read_image(str(tmp_path / "x.dcm")))
    assert grey.shape == (6, 8) and grey.dtype == np.uint8
    assert (grey[0, 0] < grey[-1, -1]) == (photometric == "MONOCHROME2")


def test_16_bit_images_keep_their_range(tmp_path):
    # 12 bit in 16: a plain conversion would clip nearly all of it.
    pixels = (np.arange(64).reshape(8, 8) * 60).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    grey = np.asarray(read_image(str(tmp_path / "x.png"))).astype(int)
    assert len(np.unique(grey)) == 64 and np.abs(grey - pixels / pixels.max() * 255).max() <= 1


@pytest.mark.parametrize("content", [b"", b"no dicom"])
def test_files_that_are_no_dicom_are_named(content, tmp_path):
    (tmp_path / "x.dcm").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*x\.dcm"):
        read_image(str(tmp_path / "x.dcm"))


@pytest.mark.slow
def test_a_dicom_folder_is_predicted_in_its_own_space(btcv, tiny, bare, tmp_path):
    from smae_utils.predict_files import predict
    from smae_utils.work.finetune import finetune

    run = finetune(
        "btcv",
        btcv,
        tmp_path / "run",
        preset=bare,
        overrides={**tiny["btcv", "finetune"], "steps": 1},
        report=[].append,
    )
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


def test_slices_lie_where_their_positions_say_whatever_their_numbers_and_names(tmp_path):
    folder = write_series(tmp_path / "s", numbers=[4, 1, 6, 2, 5, 3])
    np.testing.assert_array_equal(values_at_places(folder), STORED)


def test_a_series_is_what_simpleitk_reads(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK, of the itk extra, is not installed")
    folder = write_series(
        tmp_path / "s",
        names="{:03d}.dcm",
        RescaleSlope=lambda place: 0.5 * (place + 1),
        RescaleIntercept=lambda place: place - 3,
    )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    theirs = reader.Execute()
    ours = ReadScan(["image"])({"image": str(folder)})["image"]
    for index in ([0, 0, 0], [6, 4, 5], [2, 3, 1]):
        place = np.array(theirs.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        voxel = np.linalg.inv(np.asarray(ours.affine)) @ [*place, 1]
        np.testing.assert_allclose(voxel, voxel.round(), atol=1e-6)
        assert float(ours[(0, *voxel[:3].round().astype(int))]) == pytest.approx(theirs[index], abs=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda f: write_series(f, places=[0, 1, 2, 4, 5]),
            r"not evenly spaced: 4 mm apart, but 8 mm after slice 3 of 5",
        ),
        (
            lambda f: [write_series(f), write_series(f, names="again{}", numbers=range(10, 16))],
            "6 slices at a place where another one lies",
        ),
        (
            lambda f: write_series(f, position=lambda k: [-10.0, -20.0 + k, -30.0 + 4 * k]),
            r"tilted gantry.*dcm2niix",
        ),
        (
            lambda f: [
                write_series(f, places=[0, 1, 2]),
                write_series(
                    f, places=[3, 4, 5], names="other{}", ImageOrientationPatient=[0, 1, 0, 0, 0, -1]
                ),
            ],
            "2 sizes or directions",
        ),
        (lambda f: (f.mkdir(), (f / "LICENSE").write_text("free")), "holds no DICOM images"),
    ],
    ids=["a slice is missing", "two acquisitions", "tilted gantry", "two directions", "no images"],
)
def test_slices_that_are_no_volume_are_refused_with_what_was_found(make, words, tmp_path):
    make(tmp_path / "s")
    with pytest.raises(UserError, match=words):
        ReadScan(["image"])({"image": str(tmp_path / "s")})


def test_of_two_series_in_a_folder_one_has_to_be_chosen(tmp_path):
    folder = write_series(tmp_path / "s", "1.2.3", SeriesNumber=2, SeriesDescription="thin")
    write_series(folder, "1.2.4", names="b{}", SeriesNumber=5, places=[5, 4, 3, 2, 1, 0], RescaleIntercept=7)
    with pytest.raises(UserError, match=r"2 series, 1\.2\.3 \(number 2, 'thin', 6 images\).*s#1\.2\.3"):
        values_at_places(folder)
    for series, more in (("1.2.3", 0), ("2", 0), ("5", 7), ("1.2.4", 7)):
        np.testing.assert_array_equal(values_at_places(f"{folder}#{series}"), STORED + more)
    with pytest.raises(UserError, match="no single series '9'"):
        values_at_places(f"{folder}#9")


def test_licence_texts_localizers_and_missing_endings_are_no_obstacle(tmp_path):
    folder = write_series(tmp_path / "s")
    (folder / "LICENSE").write_text("You may use these data.")
    write_series(
        folder, "1.2.9", places=[0, 3], names="scout{}", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    np.testing.assert_array_equal(values_at_places(folder), STORED)


def test_one_slice_is_as_thick_as_its_header_says(tmp_path):
    image = ReadScan(["image"])({"image": str(write_series(tmp_path / "s", places=[2]))})["image"]
    np.testing.assert_allclose(sorted(nib.affines.voxel_sizes(np.asarray(image.affine))), [2, 3, 4])


def test_an_enhanced_multi_frame_file_is_the_series_in_one_file(tmp_path):
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

    def group(name: str, **values) -> Dataset:
        inner, outer = Dataset(), Dataset()
        for key, value in values.items():
            setattr(inner, key, value)
        setattr(outer, name, [inner])
        return outer

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = (
        EnhancedCTImageStorage,
        generate_uid(),
        ExplicitVRLittleEndian,
    )
    file = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID, file.SeriesInstanceUID, file.Modality = (
        EnhancedCTImageStorage,
        meta.MediaStorageSOPInstanceUID,
        "1.2.3",
        "CT",
    )
    file.FrameOfReferenceUID, file.StudyInstanceUID = "1.2.5", "1.2.6"
    file.NumberOfFrames, file.Rows, file.Columns = STORED.shape
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 1
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    shared = group(
        "PixelMeasuresSequence", PixelSpacing=[3.0, 2.0], SliceThickness=4.0, SpacingBetweenSlices=4.0
    )
    shared.update(group("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
    shared.update(
        group("PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
    )
    frames = []
    order = [3, 0, 5, 1, 4, 2]  # frames in no order
    for place in order:
        frame = group("PlanePositionSequence", ImagePositionPatient=[-10.0, -20.0, -30.0 + 4 * place])
        frame.update(
            group(
                "FrameContentSequence",
                StackID="1",
                InStackPositionNumber=place + 1,
                DimensionIndexValues=[1, place + 1],
            )
        )
        frames.append(frame)
    file.SharedFunctionalGroupsSequence, file.PerFrameFunctionalGroupsSequence = [shared], frames
    file.PixelData = STORED[order].astype(np.int16).tobytes()
    (tmp_path / "s").mkdir()
    file.save_as(tmp_path / "s" / "enhanced.dcm", enforce_file_format=True)
    for path in (tmp_path / "s", tmp_path / "s" / "enhanced.dcm"):
        np.testing.assert_array_equal(values_at_places(path), STORED - 1024)


def test_pixels_outside_the_exposed_field_are_black_and_do_not_squeeze_the_film(tmp_path):
    film = np.zeros((30, 30), int)
    film[5:25, 5:25] = 2000 + 10 * np.arange(20)
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        write_slice(tmp_path / "x.dcm", film, 1, "1.2", photometric=photometric, PixelPaddingValue=0)
        grey = np.asarray(read_image(tmp_path / "x.dcm")).astype(int)
        assert grey[0, 0] == 0 and (grey[5:25, 5:25].min(), grey[5:25, 5:25].max()) == (0, 255)


def test_a_window_in_the_file_is_what_a_viewer_shows(tmp_path):
    pixels = np.arange(64).reshape(8, 8) * 60
    write_slice(tmp_path / "x.dcm", pixels, 1, "1.2", WindowCenter=1000, WindowWidth=400)
    grey = np.asarray(read_image(tmp_path / "x.dcm")).astype(int)
    expected = ((pixels - (1000 - 0.5)) / (400 - 1) + 0.5).clip(0, 1) * 255  # DICOM PS3.3, C.11.2.1.2
    assert np.abs(grey - expected).max() <= 1


def test_colours_of_a_palette_are_seen_and_volumes_of_colours_refused(tmp_path):
    index = np.zeros((8, 8), np.uint8)
    index[:, 4:] = 1
    lut = np.zeros(256, np.uint16)
    lut[:2] = 65535, 8000
    names = [f"{c}PaletteColorLookupTable" for c in ("Red", "Green", "Blue")]
    palette = {f"{n}Descriptor": [256, 0, 16] for n in names} | {f"{n}Data": lut.tobytes() for n in names}
    bits = {
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "PixelData": index.tobytes(),
    }
    write_slice(tmp_path / "x", index, 1, "1.2", photometric="PALETTE COLOR", **bits, **palette)
    image = read_image(tmp_path / "x")
    assert (
        image.mode == "RGB"
        and np.asarray(image)[0, 0].tolist() == [255] * 3
        and np.asarray(image)[0, 7].tolist() == [31] * 3
    )
    with pytest.raises(UserError, match="colour images"):
        values_at_places(tmp_path / "x")


def test_several_frames_are_no_radiograph(tmp_path):
    write_slice(
        tmp_path / "x.dcm",
        np.zeros((4, 4)),
        1,
        "1.2",
        NumberOfFrames=3,
        PixelData=np.zeros((3, 4, 4), np.int16).tobytes(),
    )
    with pytest.raises(UserError, match="3 frames"):
        read_image(tmp_path / "x.dcm")


def test_empty_attributes_as_anonymisers_leave_them_count_as_absent(tmp_path):
    pixels = np.arange(64).reshape(8, 8) * 60
    write_slice(
        tmp_path / "x.dcm", pixels, 1, "1.2", WindowCenter=None, WindowWidth=None, PixelPaddingValue=None
    )
    grey = np.asarray(read_image(tmp_path / "x.dcm")).astype(int)
    assert (grey.min(), grey.max()) == (0, 255)

"""A CT on the voxel grid that the network was trained on, and its way back to the patient.

Volumes are ``(H, W, D)`` in nnU-Net's axis order, in the canonical domain (HU window scaled to [0, 1]).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.files import read_json
from nnunetv2_hiendmae.intensity import Window, hu_to_canonical, to_canonical
from pretraining.data.b2nd import DataSet, PreprocessedCorpus
from pretraining.data.corpus import canonical_volume
from pretraining.prepare.find import Source as ImageSource
from pretraining.prepare.find import find_series
from pretraining.prepare.geometry import Refused
from pretraining.prepare.quality import Gate, check_voxels
from pretraining.prepare.read import itk_reason, read

Triple = tuple[float, float, float]


PICTURE_GATE = Gate(min_slices=1, min_extent_mm=0, min_fat_or_air=0)
"""A small piece of a CT is good enough to look at; something that is not in HU is not."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where the voxels of an image lie, SimpleITK's way: x, y, z."""

    origin: Triple
    spacing: Triple
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: sitk.Image) -> Frame:
        return cls(origin=image.GetOrigin(), spacing=image.GetSpacing(), direction=image.GetDirection())

    def place(self, image: sitk.Image) -> sitk.Image:
        """The image, moved here."""
        image.SetOrigin(self.origin)
        image.SetSpacing(self.spacing)
        image.SetDirection(self.direction)
        return image

    def to_patient(self, index: tuple[float, ...]) -> Triple:
        """Voxel index x, y, z to mm."""
        return self.place(sitk.Image(1, 1, 1, sitk.sitkUInt8)).TransformContinuousIndexToPhysicalPoint(index)

    def to_index(self, point: tuple[float, ...]) -> Triple:
        """Mm to a continuous voxel index x, y, z."""
        return self.place(sitk.Image(1, 1, 1, sitk.sitkUInt8)).TransformPhysicalPointToContinuousIndex(point)

    def transposed(self, axes: list[int]) -> Frame:
        """The frame of the same image with its array ``(z, y, x)`` transposed so."""
        order = [2 - axis for axis in axes[::-1]]
        x, y, z = (self.spacing[axis] for axis in order)
        columns = np.reshape(self.direction, (3, 3))[:, order]
        return replace(self, spacing=(x, y, z), direction=tuple(columns.ravel().tolist()))

    def resampled(self, size: tuple[int, ...], new_size: tuple[int, ...]) -> Frame:
        """The frame of the same extent cut into other voxels; sizes are x, y, z."""
        spacing = tuple(s * n / m for s, n, m in zip(self.spacing, size, new_size, strict=True))
        corner = tuple((m / n - 1) / 2 for n, m in zip(new_size, size, strict=True))
        return Frame(origin=self.to_patient(corner), spacing=spacing, direction=self.direction)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One CT."""

    name: str
    volume: np.ndarray
    """``(H, W, D)`` float32 canonical."""
    frame: Frame
    """Of ``volume``."""
    original: Frame
    """Of the file."""
    original_size: tuple[int, int, int]
    """Of the file, x, y, z."""
    window_hu: Window

    def hu(self, canonical: np.ndarray) -> np.ndarray:
        """Canonical values in HU."""
        low, high = self.window_hu
        return canonical * (high - low) + low

    def voxel(self, given: tuple[int, int, int] | None) -> Size:
        """Index ``(h, w, d)`` in ``volume`` of a voxel x, y, z of the file; by default the middle of the body.

        Raises:
            ValueError: the voxel is not in the image.
        """
        if given is None:
            tissue = self.volume > 0
            weights = tissue if tissue.any() else np.ones_like(tissue)
            h, w, d = (round(float(axis.mean())) for axis in np.nonzero(weights))
            return h, w, d
        if not all(0 <= v < n for v, n in zip(given, self.original_size, strict=True)):
            shown = " ".join(map(str, given))
            raise ValueError(f"-voxel {shown} is not in {self.name}, which has {self.original_size} voxels (x, y, z).")
        index = self.frame.to_index(self.original.to_patient(given))[::-1]
        h, w, d = (min(max(round(i), 0), n - 1) for i, n in zip(index, self.volume.shape, strict=True))
        return h, w, d

    def original_voxel(self, voxel: Size) -> tuple[int, int, int]:
        """Index x, y, z in the file of a voxel ``(h, w, d)`` of ``volume``."""
        index = self.original.to_index(self.frame.to_patient(tuple(float(v) for v in voxel[::-1])))
        x, y, z = (min(max(round(i), 0), n - 1) for i, n in zip(index, self.original_size, strict=True))
        return x, y, z

    def save(self, canonical: np.ndarray, file: Path) -> None:
        """Write a volume like ``volume`` in HU, rounded, as ``.nii.gz`` in the patient's coordinates."""
        hu = np.clip(np.rint(self.hu(canonical)), -32768, 32767).astype(np.int16)
        image = self.frame.place(sitk.GetImageFromArray(hu))
        temporary = file.with_name(f"unfinished_{file.name}")  # SimpleITK goes by the ending
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
            temporary.replace(file)
        except RuntimeError as error:
            raise OSError(f"{file} could not be written ({itk_reason(error)})") from None
        finally:
            temporary.unlink(missing_ok=True)


def read_ct(path: Path, spacing: Triple, window: Window) -> Case:
    """A CT file, or a folder with one DICOM series, resampled.

    Args:
        spacing: mm in the axis order of the volume (slices, rows, columns).
        window: HU range scaled to [0, 1].

    Raises:
        ValueError: it cannot be read, or is no CT volume; says why.
    """
    return case_of(read_image(path), path.resolve().name, spacing, window)


def read_image(path: Path) -> sitk.Image:
    """What ``-i`` names. ``ValueError`` as ``read_ct``."""
    try:
        image = read(image_source(path))
        check_voxels(sitk.GetArrayViewFromImage(image), image.GetSpacing()[::-1], PICTURE_GATE)
    except Refused as reason:
        raise ValueError(f"-i {path}: {reason}.") from None
    return image


def case_of(image: sitk.Image, name: str, spacing: Triple, window: Window) -> Case:
    """An image in HU, resampled by nnU-Net's own function; arguments as for ``read_ct``."""
    original = Frame.of(image)
    hu = sitk.GetArrayFromImage(image).astype(np.float32)
    canonical = to_canonical(hu, *hu_to_canonical(window))
    shape = np.maximum(compute_new_shape(hu.shape, original.spacing[::-1], spacing), 1)
    # The settings are those of nnU-Net's plans for images.
    resampled = resample_data_or_seg_to_shape(
        canonical[None], shape, original.spacing[::-1], spacing, is_seg=False, order=3, order_z=0, force_separate_z=None
    )[0]
    size = tuple(int(n) for n in shape[::-1])
    return Case(
        name=name,
        volume=np.clip(resampled, 0, 1).astype(np.float32),
        frame=original.resampled(image.GetSize(), size),
        original=original,
        original_size=image.GetSize(),
        window_hu=window,
    )


def image_source(path: Path) -> ImageSource:
    """The file, or the DICOM series of a folder. ``Refused`` if there is not exactly one."""
    if not path.is_dir():
        return ImageSource(path.name, (str(path),))
    series = [s for s in find_series(path, path, sorted(p.name for p in path.iterdir() if p.is_file())) if s.is_dicom]
    if len(series) != 1:
        raise Refused(f"a folder with {len(series)} DICOM series; name a file, or a folder with one series")
    return series[0]


def read_preprocessed(dataset: str, name: str, plans_name: str, configuration: str, window: Window) -> Case:
    """A case as nnU-Net preprocessed it.

    Args:
        window: HU range scaled to [0, 1].

    Raises:
        ValueError: data set, plans or case are missing; says what to do.
    """
    found = DataSet.open(dataset, plans_name, configuration, window)
    if name not in found.cases:
        raise ValueError(f"-case {name} is not in {found.folder}, which has {', '.join(found.cases[:3])}, ...")
    for warning in found.warnings:
        print(f"WARNING: {warning.removeprefix('WARNING: ')}", flush=True)
    corpus = PreprocessedCorpus([replace(found, cases=(name,))])
    volume = canonical_volume(corpus.read(0, (0, 0, 0), corpus.shape(0)), corpus.intensity(0))[0]
    properties = load_pickle(str(found.folder / f"{name}.pkl"))
    if "sitk_stuff" not in properties:
        raise ValueError(
            f"-case {name}: {found.name} was not read with nnU-Net's SimpleITKIO, and other geometries are not "
            f"followed; give the image itself with -i."
        )
    geometry = properties["sitk_stuff"]
    original = Frame(origin=geometry["origin"], spacing=geometry["spacing"], direction=geometry["direction"])
    plan = read_json(found.folder.parent / f"{plans_name}.json")
    whole = original.transposed(plan["transpose_forward"])
    box = properties["bbox_used_for_cropping"][::-1]  # x, y, z of the transposed image
    cropped = replace(whole, origin=whole.to_patient(tuple(float(low) for low, _ in box)))
    size = [int(properties["shape_before_cropping"][axis]) for axis in plan["transpose_backward"]]
    return Case(
        name=f"{found.name}/{name}",
        volume=volume,
        frame=cropped.resampled(tuple(high - low for low, high in box), volume.shape[::-1]),
        original=original,
        original_size=(size[2], size[1], size[0]),
        window_hu=window,
    )

"""Write a mask as a DICOM segmentation that refers to the slices of its series (DICOM PS3.3 A.51).

This is the only output that names the patient: the standard copies patient and study from the slices.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import report_full_disk
from mfm_nnunet.version import __version__

ENDING = ".dcm"
NAME = "mfm_nnunet"
SERIES_NUMBER = 300
"""Number of the new series in its study."""
_INSTALL = "Run: pip install 'mfm_nnunet[dicom]'"


def load_highdicom() -> Any:
    """Import highdicom; raise MFMError (E_NOT_FOUND) with the command that installs it."""
    try:
        import highdicom
    except ImportError as error:
        text = f"--dicom-seg needs the package highdicom, which is not installed. {_INSTALL}"
        raise MFMError("E_NOT_FOUND", text) from error
    return highdicom


def write_segmentation(
    mask_DHW: np.ndarray, slices: Sequence[Path], labels: Mapping[str, Sequence[int]], model: str, target: Path
) -> None:
    """Write the segments of a mask on the grid of ``slices``, in their order, and verify the file by reading it.

    ``labels`` holds the values of each foreground label; several make a region, and regions may overlap. ``model`` is
    the digest of the model, kept as the series' description. Raises MFMError: E_GEOMETRY (slices without a place),
    E_FORMAT (slices that highdicom refuses, or a file that reads back otherwise), E_DISK_FULL.
    """
    highdicom, pydicom = load_highdicom(), _pydicom()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would print values of the header
        sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in slices]
        if "ImagePositionPatient" not in sources[0]:
            raise MFMError(
                "E_GEOMETRY", "the series has no position in space, so no DICOM segmentation can refer to it."
            )
        segments_DHWS = np.stack([np.isin(mask_DHW, values) for values in labels.values()], axis=-1)
        descriptions = [_describe_segment(highdicom, number, name) for number, name in enumerate(labels, start=1)]
        try:
            segmentation = highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=segments_DHWS.astype(np.uint8),
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=descriptions,
                series_instance_uid=highdicom.UID(),
                series_number=SERIES_NUMBER,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer=NAME,
                manufacturer_model_name=NAME,
                software_versions=__version__,
                device_serial_number=model[:16],
                series_description=f"{NAME} {__version__}",
                content_label="SEGMENTATION",
                omit_empty_frames=bool(segments_DHWS.any()),
            )
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            reason = type(error).__name__
            raise MFMError(
                "E_FORMAT", f"highdicom cannot make a segmentation of this series ({reason}): its header lacks what "
                "the standard needs. Use the mask, or complete the header."
            ) from error  # fmt: skip
        with report_full_disk(target, segments_DHWS.size // 8):
            segmentation.save_as(target)
        _require_same(highdicom.seg.segread(target), sources, segments_DHWS)


def _require_same(written: Any, sources: Sequence[Any], segments_DHWS: np.ndarray) -> None:
    """Read the segments of each slice back by the slice's UID and compare them with the mask."""
    uids = [source.SOPInstanceUID for source in sources]
    found_DHWS = written.get_pixels_by_source_instance(
        uids, assert_missing_frames_are_empty=True, ignore_spatial_locations=True
    )
    if not np.array_equal(found_DHWS, segments_DHWS):
        raise MFMError("E_FORMAT", "the DICOM segmentation reads back with other voxels than the mask. Use the mask.")


def _describe_segment(highdicom: Any, number: int, name: str) -> Any:
    """Return the description of a segment: its name, a code if SNOMED CT as known to pydicom has the name, a colour."""
    from matplotlib import colormaps
    from pydicom.sr.codedict import codes

    word = "".join(part[:1].upper() + part[1:] for part in name.replace("_", " ").replace("-", " ").split())
    kind = getattr(codes.SCT, word, None) if word.isidentifier() else None
    kind = kind or highdicom.sr.CodedConcept(f"LABEL_{number}", "99MFM", name[:64])
    red, green, blue, _ = (int(255 * part) for part in colormaps["tab20"]((number - 1) % 20))
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=kind,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=NAME, version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(red, green, blue),
    )


def _pydicom() -> Any:
    from mfm_nnunet.images import dicom

    return dicom.load_pydicom()

"""nnU-Net's preprocessed datasets, as training and validation read them: a file that cannot be read is named.

Sizes and headers are checked before training starts. A file that is damaged in its middle shows only when its voxels
are read, and the errors of blosc2 and pickle say nothing of the file.
"""

from __future__ import annotations

import contextlib
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset, nnUNetDatasetBlosc2

from mfm_nnunet.data.storage import ENDINGS
from mfm_nnunet.data.volumes import PREPROCESS_AGAIN, unreadable
from mfm_nnunet.errors import MFMError

VALIDATE_AGAIN = "validate the fold of the first stage that holds the case again (mfm_train --val), which writes it."


class NamingDataset:
    """What nnU-Net's loader needs of a dataset; cases are loaded and their voxels read within :meth:`reading`."""

    def __init__(self, dataset: nnUNetBaseDataset) -> None:
        self.dataset = dataset
        self.identifiers: list[str] = dataset.identifiers
        self._case: str | None = None

    def load_case(self, case: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        """nnU-Net's image, label map, prediction of the stage before (or None), and properties."""
        self._case = case
        return self.dataset.load_case(case)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Raises MFMError (E_SHORT_DATA) in place of an error that a damaged file of the case loaded last explains."""
        try:
            yield
        except MFMError:
            raise
        except Exception as error:
            for file, repair in self._files().items() if self._case is not None else ():
                if (reason := _damage(file)) is not None:
                    raise unreadable(str(file), reason, repair) from error
            raise

    def _files(self) -> dict[Path, str]:
        """The files of the case loaded last, and how to make each again; of nnU-Net's older layout the packed ones."""
        folder, before = Path(self.dataset.source_folder), self.dataset.folder_with_segs_from_previous_stage
        endings = ENDINGS if isinstance(self.dataset, nnUNetDatasetBlosc2) else (".pkl", ".npz")
        files = {folder / f"{self._case}{ending}": PREPROCESS_AGAIN for ending in endings}
        if before is not None:
            files[Path(before) / f"{self._case}{endings[-1]}"] = VALIDATE_AGAIN
        return files


def _damage(file: Path) -> Exception | None:
    """Why a file cannot be read from its beginning to its end; None for a whole one."""
    try:
        if file.suffix == ".pkl":
            for _ in pickletools.genops(file.read_bytes()):  # reads the instructions and runs none
                pass
        elif file.suffix == ".b2nd":
            blosc2.open(urlpath=str(file), mode="r")[:]
        else:
            with np.load(file, allow_pickle=False) as arrays:
                [arrays[name] for name in arrays]
    except MemoryError:
        return None
    except Exception as error:  # damaged pickles and archives raise anything
        return error
    return None

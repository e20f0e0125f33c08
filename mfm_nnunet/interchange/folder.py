"""Checkpoints as a folder ready for a model hub: safetensors, JSON and a model card.

safetensors stores each tensor once; further names of a tensor are listed in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import atomic_write, parse_json, read_json, sha256, shown
from mfm_nnunet.interchange.foreign import Reading
from mfm_nnunet.models.families import NetworkFamily, family_of_class
from mfm_nnunet.plan import Plan
from mfm_nnunet.terminal import in_markdown

logger = logging.getLogger(__name__)

CARD = "README.md"
UNKNOWN_LICENCE = "other"
CURVE = {"progress.png": "Losses, learning rate and time of each epoch of pretraining"}
SCANS = {"examples.png": "A crop of a scan: what the task saw, hid and restored"}
"""Pictures that a run leaves beside its checkpoint, with their titles in the card. Only the first show no scan."""
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_ALIASES = "aliases"
_DIGEST = "sha256"
"""Key in ``config.json`` for the SHA-256 of the weights file, because safetensors has no checksums."""


def is_folder_checkpoint(place: Path) -> bool:
    """Return whether ``place`` was written by :func:`write_hub_folder`; it may be damaged.

    Other repositories may have files of the same names, but their ``config.json`` has no ``mfm``.
    """
    if not ((place / WEIGHTS).is_file() and (place / CONFIG).is_file()):
        return False
    try:
        return "mfm" in parse_json((place / CONFIG).read_bytes())
    except (ValueError, TypeError):
        return True


def write_hub_folder(content: Mapping[str, Any], folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Write ``model.safetensors``, ``config.json`` (the ``mfm`` key), pictures and a model card into ``folder``."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _once(content["network_weights"])
    weights = save(tensors, metadata={"format": "pt", _ALIASES: json.dumps(aliases)})
    config = {"mfm": content["mfm"], _DIGEST: hashlib.sha256(weights).hexdigest()}
    files = {
        WEIGHTS: weights,
        CONFIG: json.dumps(config, indent=1).encode(),
        CARD: model_card(content["mfm"], sum(map(Tensor.numel, tensors.values())), "folder", pictures).encode(),
        **pictures,
    }
    for name, data in files.items():
        with atomic_write(folder / name) as file:
            file.write(data)


def read_folder(folder: Path) -> dict[str, Any]:
    """Load the checkpoint in a folder, with the content that :func:`mfm_nnunet.checkpoint.load` returns for files."""
    file = folder / WEIGHTS
    config = read_json(folder / CONFIG, "Copy the folder again.", "E_MODEL_CORRUPT")
    mfm, digest = config.get("mfm"), config.get(_DIGEST)
    if digest is not None and sha256(file) != digest:
        raise MFMError(
            "E_MODEL_CORRUPT", f"{file}: the SHA-256 differs from the one in {CONFIG}. Copy the folder again."
        )
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            weights: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            aliases = parse_json((opened.metadata() or {}).get(_ALIASES, "{}"))
        weights |= {name: weights[first] for name, first in aliases.items()}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MFMError("E_MODEL_CORRUPT", f"{file}: damaged ({error}). Copy the folder again.") from error
    if not isinstance(mfm, dict) or mfm.get("kind") != "pretrained":
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"{folder / CONFIG}: does not describe a checkpoint of mfm_nnunet. Export the checkpoint again.",
        )
    return {"network_weights": weights, "mfm": mfm}


def _once(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor under its first name, and a map from its other names to the first."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def read_pictures(folder: Path, with_scans: bool) -> dict[str, bytes]:
    """Read the pictures beside a checkpoint; those that show scans only ``with_scans``."""
    names = [*CURVE, *(SCANS if with_scans else ())]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def stated_licence(folder: Path) -> str | None:
    """Return the licence in the header of the model card beside a checkpoint; None if there is none."""
    if not (folder / CARD).is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
    except Exception as error:  # a page of others, in any state: it states nothing
        logger.info("%s: no licence can be read from it (%s)", folder / CARD, type(error).__name__)
        return None
    licence = data.license_name if data.license == UNKNOWN_LICENCE else data.license
    return licence if isinstance(licence, str) else None


def facts(mfm: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts in a description by name, in display order. They contain nothing about subjects."""
    plans, name = mfm["plans"], mfm["configuration"]
    own = Plan.of(plans).configuration(name)
    spacing = f"spacing {_join(f'{mm:g}' for mm in own.values['spacing'])} mm" if own.is_resampled else "not resampled"
    architecture, family = _architecture(mfm)
    corpus, source = mfm.get("corpus") or {}, mfm.get("source") or {}
    found = {
        "pretext task": mfm.get("pretext") or "unknown",
        "network": family.describe(architecture) if family else "unknown",
        "trained": "the whole network" if mfm.get("trained") == "network" else "the encoder",
        "input": f"{mfm['num_inputs']} channel(s), patch {_join(mfm['patch_size'])} voxels",
        "configuration": f"{name}, patch {_join(own.patch_size)}, {spacing}",
        "normalisation": ", ".join(own.normalization_schemes),
        "axes": f"transpose_forward {list(plans['transpose_forward'])}",
    }
    if "epoch" in mfm:
        found["epochs"] = str(mfm["epoch"])
    if corpus:
        found["corpus"] = (
            f"{corpus['num_cases']} volumes of {corpus['num_subjects']} subjects, hash {corpus['hash'][:12]}"
        )
    if source:
        trainer = f" (trainer {source['trainer']})" if source.get("trainer") else ""
        found["converted from"] = f"{source.get('layout')}{trainer}"
        known = [source[name] for name in ("address", "file") if source.get(name)]
        known += [f"SHA-256 {str(source['sha256'])[:12]}"] if source.get("sha256") else []
        if known:
            found["original"] = ", ".join(map(str, known))
    found["licence"] = str(mfm.get("licence") or "not stated")
    for package, version in (mfm.get("versions") or {}).items():
        found[f"made with {package}"] = str(version)
    return found


def citations(mfm: Mapping[str, Any]) -> Iterator[str]:
    """Yield the papers to cite, one string each."""
    for entry in mfm.get("citations") or []:
        if isinstance(entry, Mapping):
            texts = entry.get("apa_citations") or entry.get("bibtex_citations") or []
            yield from map(str, texts if isinstance(texts, (list, tuple)) else [texts])
        else:
            yield str(entry)


def describe_text(reading: Reading) -> str:
    """Describe a checkpoint, one name and value per line."""
    found = [("layout", reading.layout), *facts(reading.mfm).items()]
    found += [("cite", text) for text in citations(reading.mfm)]
    found += [("note", note) for note in reading.notes]
    if reading.others:
        kinds = sorted({name.partition(".")[0] for name in reading.others})
        found.append(("not used", f"{len(reading.others)} tensors of parts that are not used here: {', '.join(kinds)}"))
    if reading.names_subjects:
        found.append(("warning", "the file names the subjects of its corpus; mfm_checkpoint import leaves them out"))
    return "\n".join(f"{name:<22}{value}" for name, value in found)


def model_card(
    mfm: Mapping[str, Any],
    num_parameters: int,
    layout: Literal["folder", "nnssl"] = "folder",
    pictures: Iterable[str] = (),
) -> str:
    """Write the text of a model card: usage, facts, pictures by file name, limits and citations of the checkpoint."""
    from huggingface_hub import ModelCard, ModelCardData

    address = str((mfm.get("source") or {}).get("address") or "")
    data = ModelCardData(
        license=mfm.get("licence") or UNKNOWN_LICENCE,
        library_name="mfm_nnunet",
        tags=["medical-imaging", "segmentation", "self-supervised-learning", "nnU-Net"],
        base_model=address.removeprefix("hf://").partition("@")[0] or None,
    )
    notes = [("on import", note) for note in (mfm.get("source") or {}).get("notes") or []]
    rows = "\n".join(f"| {in_markdown(name)} | {in_markdown(value)} |" for name, value in [*facts(mfm).items(), *notes])
    papers = "\n".join(f"* {in_markdown(text)}" for text in citations(mfm)) or "* none named"
    planned = "2d" if len(mfm["patch_size"]) == 2 else "3d_fullres"  # --like plans no other configurations
    titles = {name: title for name, title in (CURVE | SCANS).items() if name in pictures}
    images = "".join(f"![{title}]({name})\n\n" for name, title in titles.items())
    holds = "no images but the crop above" if titles.keys() & SCANS.keys() else "no images of subjects"
    text = f"""
# {in_markdown(f"{mfm.get('pretext') or 'Pretrained'} on {facts(mfm)['network']}")}

Weights of {num_parameters:,} parameters, pretrained for medical image segmentation, to be fine-tuned with mfm_nnunet:

```bash
mfm_plan_and_preprocess -d DATASET --like THIS_FOLDER
mfm_train DATASET {planned} 0 -p PLANS -pretrained_weights THIS_FOLDER
```

| | |
|---|---|
{rows}

{images}{_without_us(mfm, layout)}
The folder contains no names of subjects or files and {holds}. This is research software and not a medical device.
Fine-tune the weights, and test the result on data like yours.

## Cite

{papers}
"""
    return shown(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def _without_us(mfm: Mapping[str, Any], layout: Literal["folder", "nnssl"]) -> str:
    """Write the section on use without this package: Python code that builds the network and loads the weights."""
    architecture, family = _architecture(mfm)
    code = family.loading_code(architecture, len(mfm["patch_size"])) if family else None
    if family is None or code is None:
        return ""
    imports, weights = _WEIGHTS[layout]
    notes = [code[1]] if code[1] else []
    if layout == "folder":
        notes.insert(0, "`strict=False`: a tensor that has several names is stored under the first.")
    elif family.hides == "tokens":
        notes.append(AXES_OF_NNSSL)
    text = "\n".join(notes)
    return f"""## Without mfm_nnunet

```python
{code[0].format(imports=imports, weights=weights)}```

{text}
"""


_WEIGHTS = {
    "folder": ("from safetensors.torch import load_file", 'load_file("model.safetensors")'),
    "nnssl": ("import torch", 'torch.load("checkpoint_final.pth", weights_only=True)["network_weights"]'),
}
"""Import and expression that read the weights of each layout."""
AXES_OF_NNSSL = (
    "nnU-Net's development code flattens tokens in the same order. nnssl itself flattens axis 1 outermost (h w d) in "
    "all tasks but SimMIM: to continue its pretraining\nfrom this file exchanges the first two axes. Start such a "
    "run from the original weights."
)


def _architecture(mfm: Mapping[str, Any]) -> tuple[Mapping[str, Any], NetworkFamily | None]:
    architecture = mfm["plans"]["configurations"][mfm["configuration"]].get("architecture") or {}
    return architecture, family_of_class(str(architecture.get("network_class_name")))


def _join(sizes: Any) -> str:
    return " x ".join(map(str, sizes))

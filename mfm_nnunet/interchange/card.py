"""What a checkpoint is, for people: the lines of ``describe`` and the model card of a hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet.interchange.conversion import Reading
from mfm_nnunet.json_files import is_resampled, resolved

CARD = "README.md"
UNKNOWN_LICENCE = "other"
_STATED = re.compile(
    r"\A---\n(?:(?!---).*\n)*?licen[sc]e:\s*[\"']?(?P<name>[A-Za-z0-9.+-]+)[\"']?\s*\n(?:(?!---).*\n)*---"
)


def stated_licence(folder: Path) -> str | None:
    """The licence that the model card beside a checkpoint states in its first lines, as hubs want it; or None."""
    try:
        with open(folder / CARD, encoding="utf-8") as file:
            match = _STATED.match(file.read(10_000))
    except (OSError, UnicodeDecodeError):
        return None
    return match["name"] if match and match["name"] != UNKNOWN_LICENCE else None


def facts(mfm: Mapping[str, Any]) -> dict[str, str]:
    """What there is to say, in order; nothing about subjects, because nothing is in the description."""
    plans, name = mfm["plans"], mfm["configuration"]
    configuration = resolved(plans, name)
    architecture = configuration.get("architecture") or {}
    kwargs = architecture.get("arch_kwargs") or {}
    corpus, source = mfm.get("corpus") or {}, mfm.get("source") or {}
    found = {
        "pretext task": mfm.get("pretext") or "unknown",
        "network": str(architecture.get("network_class_name", "unknown")).rpartition(".")[2] + _size(kwargs),
        "trained": "the whole network" if mfm.get("trained") == "network" else "the encoder",
        "input": f"{mfm['num_inputs']} channel(s), patch {_times(mfm['patch_size'])} voxels",
        "configuration": f"{name}, patch {_times(configuration['patch_size'])}, {_spacing(configuration)}",
        "normalisation": ", ".join(configuration["normalization_schemes"]),
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
    """The papers to cite, one text each."""
    for entry in mfm.get("citations") or []:
        if isinstance(entry, Mapping):
            texts = entry.get("apa_citations") or entry.get("bibtex_citations") or []
            yield from map(str, texts if isinstance(texts, (list, tuple)) else [texts])
        else:
            yield str(entry)


def describe_text(reading: Reading) -> str:
    """All of it in lines of name and value."""
    found = [("layout", reading.layout), *facts(reading.mfm).items()]
    found += [("cite", text) for text in citations(reading.mfm)]
    found += [("note", note) for note in reading.notes]
    if reading.others:
        kinds = sorted({name.partition(".")[0] for name in reading.others})
        found.append(("not used", f"{len(reading.others)} tensors that no network of ours has: {', '.join(kinds)}"))
    if reading.names_subjects:
        found.append(("warning", "the file names the subjects of its corpus; import it to get one without them"))
    return "\n".join(f"{name:<22}{value}" for name, value in found)


def model_card(mfm: Mapping[str, Any], num_parameters: int) -> str:
    """A README for a hub: how to use the checkpoint, what it is, what it was not tested for, whom to cite."""
    licence = mfm.get("licence") or UNKNOWN_LICENCE
    notes = [("on import", note) for note in (mfm.get("source") or {}).get("notes") or []]
    rows = "\n".join(f"| {name} | {value} |" for name, value in [*facts(mfm).items(), *notes])
    papers = "\n".join(f"* {text}" for text in citations(mfm)) or "* none named"
    planned = "2d" if len(mfm["patch_size"]) == 2 else "3d_fullres"  # by --like, whatever was pretrained
    return f"""---
license: {licence}
library_name: mfm_nnunet
tags: [medical-imaging, segmentation, self-supervised-learning, nnU-Net]
---

# {mfm.get("pretext") or "Pretrained"} on {facts(mfm)["network"]}

Weights of {num_parameters:,} parameters, pretrained for medical image segmentation, to be fine-tuned with mfm_nnunet:

```bash
mfm_plan_and_preprocess -d DATASET --like THIS_FOLDER
mfm_train DATASET {planned} 0 -p PLANS -pretrained_weights THIS_FOLDER
```

| | |
|---|---|
{rows}

The folder holds no names of subjects or files and no images. It is research software and not a medical device: a start
for fine-tuning, and what comes of it is to be tested on data like yours.

## Cite

{papers}
"""


def _times(sizes: Any) -> str:
    return " x ".join(map(str, sizes))


def _spacing(configuration: Mapping[str, Any]) -> str:
    if not is_resampled(configuration):
        return "not resampled"
    return f"spacing {_times(f'{value:g}' for value in configuration['spacing'])} mm"


def _size(kwargs: Mapping[str, Any]) -> str:
    if "features_per_stage" in kwargs:
        return f", widths {', '.join(map(str, kwargs['features_per_stage']))}"
    if "embed_dim" in kwargs:
        return f", width {kwargs['embed_dim']}, {kwargs['eva_depth']} blocks, {kwargs['eva_numheads']} heads"
    return ""

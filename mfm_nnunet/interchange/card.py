"""What a checkpoint is, for people: the lines of ``describe`` and the model card of a hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mfm_nnunet.interchange.foreign import Reading
from mfm_nnunet.plan import is_resampled, resolved
from mfm_nnunet.terminal import in_markdown

CARD = "README.md"
UNKNOWN_LICENCE = "other"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
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
    network, kwargs = _architecture(mfm)
    corpus, source = mfm.get("corpus") or {}, mfm.get("source") or {}
    found = {
        "pretext task": mfm.get("pretext") or "unknown",
        "network": network + _size(kwargs),
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


def model_card(mfm: Mapping[str, Any], num_parameters: int, layout: Literal["folder", "nnssl"] = "folder") -> str:
    """A README for a hub: how to use the checkpoint, what it is, what it was not tested for, whom to cite."""
    licence = mfm.get("licence") or UNKNOWN_LICENCE
    notes = [("on import", note) for note in (mfm.get("source") or {}).get("notes") or []]
    rows = "\n".join(f"| {in_markdown(name)} | {in_markdown(value)} |" for name, value in [*facts(mfm).items(), *notes])
    papers = "\n".join(f"* {in_markdown(text)}" for text in citations(mfm)) or "* none named"
    planned = "2d" if len(mfm["patch_size"]) == 2 else "3d_fullres"  # by --like, whatever was pretrained
    return f"""---
license: {licence if _PLAIN.fullmatch(licence) else json.dumps(licence)}
library_name: mfm_nnunet
tags: [medical-imaging, segmentation, self-supervised-learning, nnU-Net]
---

# {in_markdown(f"{mfm.get('pretext') or 'Pretrained'} on {facts(mfm)['network']}")}

Weights of {num_parameters:,} parameters, pretrained for medical image segmentation, to be fine-tuned with mfm_nnunet:

```bash
mfm_plan_and_preprocess -d DATASET --like THIS_FOLDER
mfm_train DATASET {planned} 0 -p PLANS -pretrained_weights THIS_FOLDER
```

| | |
|---|---|
{rows}

{_without_us(mfm, layout)}
The folder holds no names of subjects or files and no images. It is research software and not a medical device: a start
for fine-tuning, and what comes of it is to be tested on data like yours.

## Cite

{papers}
"""


def _without_us(mfm: Mapping[str, Any], layout: Literal["folder", "nnssl"]) -> str:
    """Explain how other programs use the weights: lines of Python that build the network and load what fits it."""
    name, kwargs = _architecture(mfm)
    if name == "PrimusSeg":
        if kwargs.get("version", 1) != 1 or len(mfm["patch_size"]) != 3:
            return ""
        build, notes = _PRIMUS, [_ABOUT_PRIMUS]
    elif name in ("ResidualEncoderUNet", "PlainConvUNet"):
        build, notes = _UNET, []
    else:
        return ""
    imports, weights = _WEIGHTS[layout]
    if layout == "folder":
        notes.insert(0, "`strict=False`: a tensor that has several names is stored under the first.")
    elif name == "PrimusSeg":
        notes.append(AXES_OF_NNSSL)
    text = "\n".join(notes)
    return f"""## Without mfm_nnunet

```python
{build.format(imports=imports, weights=weights)}```

{text}
"""


_WEIGHTS = {
    "folder": ("from safetensors.torch import load_file", 'load_file("model.safetensors")'),
    "nnssl": ("import torch", 'torch.load("checkpoint_final.pth", weights_only=True)["network_weights"]'),
}
"""The import that reads the weights of a layout, and the expression."""
_UNET = """\
import json
{imports}
from dynamic_network_architectures.architectures import unet
from torch import nn

mfm = json.load(open("config.json"))["mfm"]
architecture = mfm["plans"]["configurations"][mfm["configuration"]]["architecture"]
kwargs = dict(architecture["arch_kwargs"])
for key in architecture["_kw_requires_import"]:  # names of classes of torch.nn, or none
    kwargs[key] = getattr(nn, str(kwargs[key]).split(".")[-1], None)
network_class = getattr(unet, architecture["network_class_name"].split(".")[-1])
network = network_class(mfm["num_inputs"], num_classes=mfm["num_outputs"], **kwargs)
missing, unexpected = network.load_state_dict({weights}, strict=False)
assert not unexpected
"""
_PRIMUS = """\
import json
{imports}
from dynamic_network_architectures.architectures.primus import Primus

mfm = json.load(open("config.json"))["mfm"]
kwargs = mfm["plans"]["configurations"][mfm["configuration"]]["architecture"]["arch_kwargs"]
kwargs = {{"init_values": 0.1, "scale_attn_inner": True, **kwargs, "input_shape": mfm["patch_size"]}}
network = Primus(mfm["num_inputs"], num_classes=mfm["num_outputs"], **kwargs)
weights = {weights}
encoder = {{name: weights[name] for name in weights if name.startswith(("down_projection.", "eva."))}}
missing, unexpected = network.load_state_dict(encoder, strict=False)
assert not unexpected
"""
_ABOUT_PRIMUS = (
    "It needs dynamic-network-architectures 0.4.3 or newer, which flattens tokens axis 0 outermost (w h d), as these "
    "weights do.\nStem and transformer fit; the patch decoder is that of mfm_nnunet, whose widths do not depend on "
    "the number of outputs."
)
AXES_OF_NNSSL = (
    "nnU-Net's development code flattens tokens in the same order. nnssl itself flattens axis 1 outermost (h w d) in "
    "all tasks but SimMIM: to continue its pretraining\nfrom this file exchanges the first two axes. Start such a "
    "run from the original weights."
)


def _architecture(mfm: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name of the network's class, without its module, and its arguments."""
    architecture = mfm["plans"]["configurations"][mfm["configuration"]].get("architecture") or {}
    name = str(architecture.get("network_class_name", "unknown")).rpartition(".")[2]
    return name, architecture.get("arch_kwargs") or {}


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

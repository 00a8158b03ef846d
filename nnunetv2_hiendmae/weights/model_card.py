"""The model card of shared weights: everything in it comes from the weights' header."""

from __future__ import annotations

from typing import Any

from nnunetv2_hiendmae.weights.file import Weights

FRONT_MATTER = """---
license: {licence}
library_name: nnunetv2_hiendmae
pipeline_tag: image-segmentation
tags:
  - medical
  - computed-tomography
  - self-supervised
  - masked-autoencoder
  - nnunet
---
"""

SEEN_CT = "CT in Hounsfield units: the encoder saw {low:g} to {high:g} HU and nothing outside, and no other modality."
SEEN_OTHER = (
    "The encoder saw intensities that were normalised otherwise than in HU (table above), perhaps of other modalities; "
    "its first layers have to adapt to CT."
)

USE = """## Use

With nnunetv2_hiendmae and its `hub` extra installed:

```bash
hiendmae_share pull -repo {repo} -o weights.pth
HIENDMAE_WEIGHTS=weights.pth nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerHiEndMAE
```

## Intended use and limits

- Starting point for training segmentation networks on CT, in research. **Not a medical device**; not validated for
  patients. These weights segment nothing by themselves.
- {seen}
- It knows the anatomy, scanners, protocols and patients of the data above, with their biases. The papers on
  masked pre-training report their largest gains with few labels; with many, a plain nnU-Net may be as good.
- Do not test on scans that are in the data above.

## Citation

```bibtex
@article{{tang2025hiendmae,
  title   = {{Hi-End-MAE: Hierarchical encoder-driven masked autoencoders are stronger vision learners for medical image
             segmentation}},
  author  = {{Tang, Fenghe and Yao, Qingsong and Ma, Wenxin and Wu, Chenxu and Jiang, Zihang and Zhou, S. Kevin}},
  journal = {{Medical Image Analysis}},
  year    = {{2025}},
  doi     = {{10.1016/j.media.2025.103770}}
}}
```
"""


def model_card(weights: Weights, repo: str, licence: str) -> str:
    """Markdown for the hub: data, training, licence, use, limits, citation.

    Args:
        weights: what is shared.
        repo: ``user/name`` on the hub.
        licence: the hub's identifier, such as cc-by-4.0, or "other".
    """
    header = weights.header
    low, high = weights.window_hu
    parts = [
        FRONT_MATTER.format(licence=licence),
        f"# {repo.rpartition('/')[2]}\n",
        f"{origin_of(header)}\n",
        "## Data\n",
        data_table(header),
        *ancestors(header),
        "\n## Training\n",
        fact_table(header, low, high),
        f"\nsha256 of the tensors: `{weights.sha256}`\n",
        USE.format(repo=repo, seen=SEEN_CT.format(low=low, high=high) if is_ours(header) else SEEN_OTHER),
        *(["Also cite what the weights come from:", *(f"- {text}" for text in header["source_citations"]), ""]
          if header.get("source_citations") else []),
    ]  # fmt: skip
    return "\n".join(parts)


def is_ours(header: dict[str, Any]) -> bool:
    """Whether the encoder saw CT in a HU window: imported weights of other programs say how they normalised instead."""
    return "normalization" not in header


def origin_of(header: dict[str, Any]) -> str:
    """What the weights are, in a sentence."""
    if "source" in header:
        return f"Encoder converted from another program's weights: {cell(str(header['source']))}."
    half = f", **unfinished: {header['unfinished']}**" if "unfinished" in header else ""
    return f"Encoder of a Hi-End-MAE pre-training (arXiv 2502.08347) on CT without labels{half}."


def data_table(header: dict[str, Any]) -> str:
    """One row a data set, with what its manifest says."""
    licence = str(header.get("licence", "not stated")) if "source" in header else "not stated"
    manifests = {m["dataset"]: m for m in header.get("provenance", [])}
    rows = ["| data set | cases | spacing (mm) | licence | reference | excluded overlap |", "|---|---|---|---|---|---|"]
    for data in header.get("datasets", []):
        manifest = manifests.get(data["name"], {})
        spacing = " × ".join(f"{mm:g}" for mm in header.get("spacing", {}).get(data["name"], [])) or "not stated"
        excluded = ", ".join(map(str, manifest.get("excluded_overlap", []))) or "none stated"
        words = [data["name"], str(data["cases"]), spacing, manifest.get("licence", licence)]
        rows.append(
            "| " + " | ".join(cell(w) for w in [*words, manifest.get("reference", "not stated"), excluded]) + " |"
        )
    return "\n".join(rows if len(rows) > 2 else ["The weights' header names no data set."])


def ancestors(header: dict[str, Any]) -> list[str]:
    """What the pre-training started from, nearest first, each with its data and licence."""
    rows = []
    for origin in header.get("ancestry", []):
        data = ", ".join(str(d["name"]) for d in origin.get("datasets", [])) or "not stated"
        words = [origin["file"], origin["form"], data, origin.get("licence", "not stated"), origin["sha256"]]
        rows.append("| " + " | ".join(map(cell, words)) + " |")
    head = ["| file | form | data | licence | sha256 of the encoder |", "|---|---|---|---|---|"]
    return ["\n## Started from\n", "\n".join([*head, *rows])] if rows else []


def fact_table(header: dict[str, Any], low: float, high: float) -> str:
    """Architecture and schedule."""
    facts = {**header["architecture"], "HU window": f"{low:g} … {high:g}"}
    if not is_ours(header):
        facts |= {"HU window": f"{low:g} … {high:g}, chosen here", "normalisation": ", ".join(header["normalization"])}
    names = {"img_size": "crop (voxels)", "steps": "steps", "batch_size": "crops a step", "decoder": "decoder"}
    facts |= {words: header[name] for name, words in names.items() if name in header}
    return "\n".join(["| | |", "|---|---|", *(f"| {cell(k)} | {cell(str(v))} |" for k, v in facts.items())])


def cell(text: str) -> str:
    """Text that stays in its cell."""
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

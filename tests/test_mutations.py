"""Lines whose change must not go unnoticed: each is changed in a copy of the checkout, and a test there must fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT

# what breaks; file; the line's part; what takes its place; the test that notices
MUTATIONS = [
    ("order of the taps in reconstruction", "pretraining/model.py",
     'sources = taps if', 'sources = taps[::-1] if', "test_parity_standalone.py"),
    ("order of the taps in segmentation", "nnunetv2_hiendmae/architectures/unetr.py",
     "reversed(taps), strict=True", "taps, strict=True", "test_unetr.py"),
    ("biased variance of the target", "pretraining/model.py",
     "return F.layer_norm(masked.float(), masked.shape[-1:], eps=1e-6)",
     "return (masked - masked.mean(-1, keepdim=True)) / (masked.var(-1, keepdim=True) + 1e-6).sqrt()",
     "test_properties.py"),
    ("lower bound of the window", "nnunetv2_hiendmae/intensity.py",
     "shift=(offset - low) / width", "shift=(offset - high) / width", "test_intensity.py"),
    ("padding as air", "nnunetv2_hiendmae/intensity.py",
     "return torch.where(padded, self.stored_air.to(x.dtype), x)", "return x", "test_padding.py"),
    ("clip of canonical values", "nnunetv2_hiendmae/intensity.py",
     ".clip(0, 1)", ".clip(0)", "test_intensity.py"),
    ("no decay of norms and biases", "nnunetv2_hiendmae/optim.py",
     "parameter.ndim > 1 and", "parameter.ndim > 0 and", "test_optim.py"),
    ("distance of a layer to the decoder", "nnunetv2_hiendmae/optim.py",
     "layer_decay ** (depth + 2 - layer)", "layer_decay ** (depth + 3 - layer)", "test_optim.py"),
    ("warm-up from 0", "nnunetv2_hiendmae/optim.py",
     "return position / warmup", "return (position + 1) / warmup", "test_optim.py"),
    ("number of visible tokens", "pretraining/masking.py",
     "return int(num_tokens * (1 - mask_ratio))", "return round(num_tokens * (1 - mask_ratio))", "test_masking.py"),
    ("a rank's part of a batch", "pretraining/data/loader.py",
     "+ self.rank * self.size * self.accumulate", "+ self.rank * self.size", "test_corpus.py"),
    ("place of a crop", "nnunetv2_hiendmae/crops.py",
     "slice(a - s, b - s)", "slice(0, b - a)", "test_properties.py"),
    ("channels of the patch embedding", "nnunetv2_hiendmae/weights/file.py",
     "spread = weight.sum(1, keepdim=True)", "spread = 2 * weight.sum(1, keepdim=True)", "test_unetr.py"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("what", "file", "line", "change", "test"), MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_a_changed_line_is_noticed(what: str, file: str, line: str, change: str, test: str, tmp_path: Path) -> None:
    skip = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("nnunetv2_hiendmae", "pretraining", "tests", "docs"):
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=skip)
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert text.count(line) == 1, f"{file} no longer has this line"
    (tmp_path / file).write_text(text.replace(line, change), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-n", "0", "-p", "no:cacheprovider", f"tests/{test}"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "1 failed" in done.stdout, f"{what}: {test} did not notice\n{done.stdout[-2000:]}"

"""Galleries as one HTML page that needs nothing but itself: slices are data URIs, a slider chooses."""

from __future__ import annotations

import base64
import json
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nnunetv2_hiendmae.files import atomic_file
from nnunetv2_hiendmae.intensity import Window
from pretraining.visualize.panels import ERROR_HU, FULL_COLOUR, Gallery, gray, heat
from pretraining.visualize.views import PLANES, Orientation

MOST_SLICES = 48
"""Per plane; of more, every second, third, … is on the page."""
JPEG_QUALITY = 82

STYLE = """
body { margin: 0 auto; padding: 0 12px 48px; max-width: 1500px; background: #15171a; color: #e4e6e8;
  font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { max-width: 75ch; margin: .4rem 0; overflow-wrap: anywhere; } .facts { color: #a9b0b7; }
.controls { position: sticky; top: 0; background: #15171a; padding: 8px 0; display: flex; flex-wrap: wrap; gap: 6px 14px;
  align-items: center; z-index: 1; }
.controls input[type=range] { flex: 1 1 220px; min-width: 0; height: 28px; }
.controls label { white-space: nowrap; padding: 4px 0; }
.number { min-width: 9ch; font-variant-numeric: tabular-nums; }
.panels { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(max(150px, 100% / (var(--columns) + 1)), 1fr)); }
figure { margin: 0; } figure img { width: 100%; display: block; background: #000; }
figcaption { font-size: .85rem; color: #c5cad0; white-space: pre-line; }
.scale { display: inline-flex; align-items: center; gap: 8px; margin: 8px 20px 0 0; font-size: .85rem; color: #c5cad0; }
.scale img { width: 130px; height: 12px; }
"""  # noqa: E501

SCRIPT = """
for (const section of document.querySelectorAll("section")) {
  const planes = JSON.parse(section.querySelector("script").textContent);
  const slider = section.querySelector("input[type=range]");
  const number = section.querySelector(".number");
  const images = section.querySelectorAll("figure img");
  let plane;
  const show = () => {
    const i = Number(slider.value);
    images.forEach((image, k) => { image.src = "data:image/jpeg;base64," + plane.images[i][k]; });
    number.textContent = "slice " + plane.numbers[i];
  };
  const choose = (name) => {
    plane = planes[name];
    slider.max = plane.images.length - 1;
    slider.value = plane.first;
    images.forEach((image) => { image.style.aspectRatio = plane.aspect; });
    show();
  };
  slider.addEventListener("input", show);
  for (const radio of section.querySelectorAll("input[type=radio]")) {
    radio.addEventListener("change", () => choose(radio.value));
    if (radio.checked) choose(radio.value);
  }
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1>
{facts}
{top}
{sections}
{bottom}
<script>{script}</script></body></html>
"""


def write_page(
    galleries: list[Gallery],
    orientation: Orientation,
    window: Window,
    title: str,
    facts: list[str],
    file: Path,
    top: str = "",
    bottom: str = "",
) -> None:
    """Write the page; ``title`` and ``facts`` are plain text, ``top`` and ``bottom`` HTML around the galleries."""
    html = PAGE.format(
        title=escape(title),
        style=STYLE,
        script=SCRIPT,
        facts="\n".join(f'<p class="facts">{escape(fact)}</p>' for fact in facts),
        sections="\n".join(section(gallery, orientation, window) for gallery in galleries),
        top=top,
        bottom=bottom,
    )
    with atomic_file(file) as stream:
        stream.write(html.encode(errors="replace"))  # file names may hold bytes that are no text


def section(gallery: Gallery, orientation: Orientation, window: Window) -> str:
    """One gallery with its slider."""
    planes = {plane: slices(gallery, orientation, plane) for plane in PLANES}
    # Base64 and numbers only: nothing in it can end the script element.
    data = json.dumps(planes, separators=(",", ":"))
    radios = "".join(
        f'<label><input type="radio" name="{gallery.key}" value="{p}"{" checked" if p == "axial" else ""}> {p}</label>'
        for p in PLANES
    )
    first = planes["axial"]
    figures = "".join(
        f'<figure><img alt="{escape(panel.title)}" style="aspect-ratio:{first["aspect"]}" '
        f'src="data:image/jpeg;base64,{image}"><figcaption>{escape(panel.title)}</figcaption></figure>'
        for panel, image in zip(gallery.panels, first["images"][first["first"]], strict=True)
    )
    return (
        f"<section><h2>{escape(gallery.title)}</h2><p>{escape(gallery.text)}</p>"
        f'<div class="controls">{radios}<input type="range" min="0" step="1" max="{len(first["images"]) - 1}" '
        f'value="{first["first"]}" aria-label="slice"><span class="number"></span></div>'
        f'<div class="panels" style="--columns:{gallery.columns}">{figures}</div>'
        f"<div>{''.join(scale(name, window) for name in gallery.scales)}</div>"
        f'<script type="application/json">{data}</script></section>'
    )


def slices(gallery: Gallery, orientation: Orientation, plane: str) -> dict[str, Any]:
    """Images of a plane, ``[slice][panel]``, their slice numbers, which comes first, and a slice's aspect ratio."""
    count, rows, columns = orientation.slices(gallery.panels[0].volumes[0], plane).shape[:3]
    wanted = orientation.find(gallery.voxel, gallery.shape, plane)[0]
    step = -(-count // MOST_SLICES)
    numbers = list(range(wanted % step, count, step))
    height, width = orientation.pixel(plane)
    return {
        "images": [[jpeg(panel.image(orientation, plane, i)) for panel in gallery.panels] for i in numbers],
        "numbers": numbers,
        "first": numbers.index(wanted),
        "aspect": f"{columns * width:.2f}/{rows * height:.2f}",
    }


def jpeg(rgb: np.ndarray) -> str:
    """RGB uint8 as base64."""
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb)).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def scale(name: str, window: Window) -> str:
    """A legend: its colours between the values at both ends."""
    ramp = np.repeat(np.linspace(0, 1, 128)[None], 4, 0)
    low, high, colours = {
        "hu": (f"{window[0]:g} HU", f"{window[1]:g} HU", gray),
        "error": ("error 0", f"{ERROR_HU:g} HU", heat),
        "attention": ("attention 0", f"{FULL_COLOUR}th percentile of the map", heat),
    }[name]
    image = f'<img alt="" src="data:image/jpeg;base64,{jpeg(colours(ramp))}">'
    return f'<span class="scale">{low} {image} {high}</span>'

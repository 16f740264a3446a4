"""Golden outputs of the resampling.

    python3 -m venv venv && venv/bin/pip install pillow SimpleITK numpy
    venv/bin/python tests/golden/resample/make.py

Writes golden.json (the cases) and golden.bin (little-endian, float32 and int16 as the cases say) beside this script.
Inputs are made by an integer formula that the test repeats, so that only outputs are stored; the small volumes that
SimpleITK turned are stored, because the turning is what is tested.

In-plane: window in float64, then Pillow's mode-F BILINEAR resize with `box=`.
Depth, uniform: Pillow's resize of the slice axis, pixel by pixel. Irregular: the formula of src/resample/plan.rs, in
float64, written down again here without looking at its structure (dense matrices, no index tables).
Orientation: a volume in the LPS frame, turned by SimpleITK's DICOMOrient into every axial storage order; SimpleITK
resamples each back onto the LPS grid, Pillow does the rest.
"""

import json
import pathlib

import numpy as np
import SimpleITK as sitk
from PIL import Image

HERE = pathlib.Path(__file__).parent
CENTER, WIDTH = -600.0, 1500.0

blob = bytearray()
cases = {"window": [CENTER, WIDTH], "pillow": Image.__version__, "simpleitk": sitk.Version().VersionString()}


def store(array, dtype):
    at = len(blob)
    data = np.ascontiguousarray(array).astype(np.dtype(dtype).newbyteorder("<"))
    blob.extend(data.tobytes())
    return {"offset": at, "len": int(data.size)}


def pattern(n, seed):
    """A multiplicative generator in 32 bits; HU between -1500 and 1099."""
    state, out = seed & 0xFFFFFFFF, np.empty(n, np.int16)
    for i in range(n):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out[i] = (state >> 16) % 2600 - 1500
    return out


def smooth(rows, columns, seed):
    """Bumps in integers: structure at several scales, some of it beyond the window."""
    r, c = np.mgrid[0:rows, 0:columns].astype(np.int64)
    v = (r * r * 3 + c * c * 5 + r * c * 2 + seed * 977) % 8191
    tri = np.abs(v - 4095)
    return (tri * 2400 // 4096 - 1300).astype(np.int16)


def windowed(hu):
    return np.clip((hu.astype(np.float64) - (CENTER - WIDTH / 2)) / WIDTH, 0, 1)


def resize(plane, out_hw, box):
    image = Image.fromarray(plane.astype(np.float32), mode="F")
    return np.asarray(image.resize((out_hw[1], out_hw[0]), Image.Resampling.BILINEAR, box=box))


def crop_box(rows, columns, crop, shift=(0.0, 0.0)):
    h, w = rows * crop, columns * crop
    top, left = (rows - h) / 2 - shift[0], (columns - w) / 2 - shift[1]
    return (left, top, left + w, top + h)


cases["in_plane"] = []
for kind, rows, columns, crop, out_hw, shift in [
    ("smooth", 512, 512, 416 / 512, (224, 224), (0, 0)),
    ("noise", 301, 287, 0.8, (64, 60), (0, 0)),
    ("noise", 40, 30, 1.0, (48, 70), (0, 0)),
    ("noise", 33, 90, 0.61, (11, 90), (0, 0)),
    ("smooth", 256, 200, 0.7, (40, 40), (7.3, -11.75)),
    ("noise", 1024, 768, 1.0, (24, 16), (0, 0)),
]:
    hu = smooth(rows, columns, 5) if kind == "smooth" else pattern(rows * columns, rows * 1000 + columns).reshape(rows, columns)
    out = resize(windowed(hu), out_hw, crop_box(rows, columns, crop, shift))
    cases["in_plane"].append(
        {"kind": kind, "rows": rows, "columns": columns, "crop": crop, "out_hw": out_hw, "shift": shift, "data": store(out, "f4")}
    )


def tri(x):
    return np.maximum(0.0, 1.0 - np.abs(x))


def depth_matrix(d, planes, grid, head_first):
    d = np.asarray(d, np.float64)
    n = len(d)
    mid = (d[1:] + d[:-1]) / 2
    edges = np.concatenate([[d[0] - (d[1] - d[0]) / 2], mid, [d[-1] + (d[-1] - d[-2]) / 2]])
    cells = np.diff(edges)
    if grid is None:
        pitch = (edges[-1] - edges[0]) / planes
        z = edges[0] + (np.arange(planes) + 0.5) * pitch
        if head_first:
            z = z[::-1]
    else:
        pitch = grid
        z = d[-1] - np.arange(planes) * pitch if head_first else d[0] + np.arange(planes) * pitch
    m = np.zeros((planes, n))
    for p in range(planes):
        if grid is not None and not edges[0] <= z[p] <= edges[-1]:
            continue
        k = int(np.clip(np.searchsorted(d, z[p], side="right") - 1, 0, n - 2))
        step = d[k + 1] - d[k]
        if step < pitch:
            w = cells * tri((d - z[p]) / pitch)
        else:
            w = np.zeros(n)
            t = np.clip((z[p] - d[k]) / step, 0, 1)
            w[k], w[k + 1] = 1 - t, t
        m[p] = w / w.sum()
    return m


cases["depth"] = []
rng = np.random.default_rng(7)
irregular = np.cumsum(rng.uniform(0.6, 2.4, 90))
mixed = np.cumsum([1.25] * 30 + [5.0] * 12 + [2.5] * 20 + [0.625] * 15)
for name, d, planes, grid, head_first in [
    ("pillow", np.arange(123) * 2.5, 64, None, False),
    ("pillow", np.arange(300) * 1.0 - 431.5, 64, None, True),
    ("pillow", np.arange(40) * 5.0, 64, None, False),
    ("pillow", np.arange(64) * 3.3, 64, None, False),
    ("pillow", np.arange(600) * 0.6, 64, None, False),
    ("formula", irregular, 64, None, False),
    ("formula", irregular, 64, None, True),
    ("formula", mixed, 64, None, False),
    ("formula", mixed, 100, None, True),
    ("formula", mixed, 64, 3.0, False),
    ("formula", mixed, 80, 2.0, True),
    ("formula", np.arange(50) * 2.5, 64, 2.5, False),
]:
    d = np.asarray(d, np.float64)
    n = len(d)
    columns = windowed(pattern(n * 3, n)).reshape(n, 3)
    if name == "pillow":
        out = resize(columns, (planes, 3), None)
        out = out[::-1] if head_first else out
        assert np.abs(depth_matrix(d, planes, None, head_first) @ columns - out).max() < 1e-5
    else:
        out = depth_matrix(d, planes, grid, head_first) @ columns
    cases["depth"].append(
        {"kind": name, "depth_mm": list(map(float, d)), "planes": planes, "fixed_mm": grid, "head_to_feet": head_first, "data": store(out, "f4")}
    )


# A volume in the LPS frame: x to the left, y to posterior, z to the head; no symmetry, anisotropic.
volume = pattern(7 * 14 * 11, 99).reshape(7, 14, 11)
lps = sitk.GetImageFromArray(volume)
lps.SetSpacing((0.7, 0.9, 2.5))
lps.SetOrigin((-12.0, 31.0, -200.0))
OUT = (4, 8, 8)

cases["orientation"] = []
for first in "LRAP":
    for second in "LRAP":
        if (first in "LR") == (second in "LR"):
            continue
        for third in "SI":
            turned = sitk.DICOMOrient(lps, first + second + third)
            direction = np.array(turned.GetDirection()).reshape(3, 3)
            slices = sitk.GetArrayFromImage(turned)
            back = sitk.Resample(turned, lps, sitk.Transform(), sitk.sitkLinear, -2000.0, sitk.sitkFloat64)
            hu = sitk.GetArrayFromImage(back)
            assert np.abs(hu - volume).max() < 1e-6
            planes = np.stack([resize(windowed(s), OUT[1:], crop_box(14, 11, 0.9)) for s in hu])
            d, h, w = planes.shape
            out = resize(planes.reshape(d, h * w), (OUT[0], h * w), None)
            cases["orientation"].append(
                {
                    "code": first + second + third,
                    "rows": slices.shape[1],
                    "columns": slices.shape[2],
                    "row_cosines": direction[:, 0].tolist(),
                    "column_cosines": direction[:, 1].tolist(),
                    "positions": [list(turned.TransformIndexToPhysicalPoint((0, 0, k))) for k in range(slices.shape[0])],
                    "pixel_spacing_mm": [turned.GetSpacing()[1], turned.GetSpacing()[0]],
                    "out_dhw": OUT,
                    "crop": 0.9,
                    "stored": store(slices, "i2"),
                    "data": store(out, "f4"),
                }
            )

(HERE / "golden.json").write_text(json.dumps(cases, indent=1) + "\n")
(HERE / "golden.bin").write_bytes(blob)
print(len(blob), "bytes")

"""The pipeline one would build from parts: DCMTK's storescp, pydicom, SciPy, OpenVINO.

    peer_pipeline.py MODEL.onnx MODEL_DIR --threads N --spool DIR

Resident. Prints `{"ready": true, "port": …}` once storescp listens and the network is compiled and warm. Then, for each
line of stdin, waits for the end of one association and prints `{"logits": […], "printed_unix_s": …, "stages_s": {…}}`.
It starts the moment storescp's log says that the release was asked for: no grace time, no polling.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import scipy.ndimage
from worker import open_openvino

Array = npt.NDArray[np.float32]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_storescp(spool: pathlib.Path, port: int) -> subprocess.Popen[str]:
    storescp = shutil.which("storescp")
    if storescp is None:
        sys.exit("storescp is missing: apt-get install dcmtk")
    return subprocess.Popen(
        [storescp, "--verbose", "--prefer-little", "--output-directory", spool, str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TCP_NODELAY": "1"},
    )


def wait_listening(port: int) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        # A look at the kernel's table, so that no association is opened and logged.
        wanted = f"{port:04X}"
        for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{wanted}") and fields[3] == "0A":
                return
        time.sleep(0.02)
    sys.exit("storescp does not listen within 30 s")


def read_slice(path: pathlib.Path) -> tuple[float, Array]:
    """Position along the normal of the slice, and its HU."""
    data = pydicom.dcmread(path)
    row, column = np.split(np.array(data.ImageOrientationPatient, float), 2)
    position = float(np.dot(np.cross(row, column), np.array(data.ImagePositionPatient, float)))
    hu = data.pixel_array.astype(np.float32)
    hu *= np.float32(data.RescaleSlope)
    hu += np.float32(data.RescaleIntercept)
    return position, hu


def prepare_volume(slices: list[Array], shape: list[int], preprocessing: dict[str, Any]) -> Array:
    """Window, centre crop, and linear interpolation to the network's shape."""
    volume = np.stack(slices)
    low = preprocessing["window_center_hu"] - preprocessing["window_width_hu"] / 2
    volume -= np.float32(low)
    volume /= np.float32(preprocessing["window_width_hu"])
    np.clip(volume, 0, 1, out=volume)
    rows, columns = (round(n * preprocessing["crop_fraction"]) for n in volume.shape[1:])
    top, left = (volume.shape[1] - rows) // 2, (volume.shape[2] - columns) // 2
    volume = volume[:, top : top + rows, left : left + columns]
    factors = [wanted / n for wanted, n in zip(shape, volume.shape, strict=True)]
    return scipy.ndimage.zoom(volume, factors, order=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("onnx", type=pathlib.Path)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--spool", type=pathlib.Path, required=True)
    args = parser.parse_args()
    manifest = tomllib.loads((args.model / "model.toml").read_text())
    shape = manifest["architecture"]["input_dhw"]
    run, _ = open_openvino(args.onnx, args.threads, {"INFERENCE_PRECISION_HINT": "f32"})
    run(np.zeros([1, 1, *shape], np.float32))
    pool = ThreadPoolExecutor(args.threads)
    port = free_port()
    storescp = start_storescp(args.spool, port)
    assert storescp.stdout is not None
    try:
        wait_listening(port)
        print(json.dumps({"ready": True, "port": port}), flush=True)
        for _ in sys.stdin:
            for line in storescp.stdout:
                if "Association Release" in line:
                    break
            released = time.time()
            read = list(pool.map(read_slice, sorted(args.spool.iterdir())))
            read.sort(key=lambda item: item[0])
            decoded = time.time()
            volume = prepare_volume([hu for _, hu in read], shape, manifest["preprocessing"])
            resampled = time.time()
            logits = run(np.ascontiguousarray(volume[None, None]))
            answer = {"logits": [float(v) for v in logits.ravel()], "slices": len(read)}
            answered = time.time()
            answer["stages_s"] = {
                "decode": decoded - released,
                "resample": resampled - decoded,
                "infer": answered - resampled,
            }
            answer["released_unix_s"] = released
            answer["printed_unix_s"] = time.time()
            print(json.dumps(answer), flush=True)
            for path in args.spool.iterdir():
                path.unlink()
    finally:
        storescp.terminate()
        storescp.wait()


if __name__ == "__main__":
    main()

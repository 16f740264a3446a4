"""One inference: every runtime and darnet in turn, round by round, with the same weights, inputs and threads."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tomllib

import numpy as np
from common import (
    HERE,
    OUT,
    Json,
    Resident,
    add_common_arguments,
    darnet,
    describe,
    export_onnx,
    log,
    machine,
    median,
    model_folder,
    table,
)

OURS = "darnet"
NAMES = [
    "openvino-f32",
    "onnxruntime",
    "torch-compiled",
    "torch-eager",
    "openvino-default",
    "openvino-int8",
    OURS,
]
# What keeps the runtimes to AVX2; ONNX Runtime has no such switch.
AVX2_ONLY = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
UNLIMITED = ["onnxruntime"]
# OpenVINO 2026.4 computes other logits under that limit (off by 0.8) on a processor that has AVX-512: its time is shown, its
# output is not judged.
NOT_JUDGED_LIMITED = ["openvino-f32"]
# Largest difference of two logits, relative to the largest logit or to 1.
TOLERANCE = 1e-3
INPUTS = 3


def write_inputs(shape: list[int]) -> list[pathlib.Path]:
    """Volumes in [0, 1]: a smooth field of another scale each, and noise, so that their logits differ."""
    files = []
    for index in range(INPUTS):
        random = np.random.default_rng(index)
        coarse = random.random([2 + 2 * index] * 3)
        volume = coarse
        for axis, n in enumerate(shape):
            at = np.linspace(0, volume.shape[axis] - 1, n)
            low = np.minimum(at.astype(int), volume.shape[axis] - 2)
            part = np.expand_dims(at - low, [a for a in range(3) if a != axis])
            volume = np.take(volume, low, axis) * (1 - part) + np.take(volume, low + 1, axis) * part
        volume = np.clip(volume * (0.5 + 0.25 * index) + 0.1 * random.random(shape), 0, 1).astype("<f4")
        files.append(OUT / f"input-{'x'.join(map(str, shape))}-{index}.safetensors")
        entry = {"volume": {"dtype": "F32", "shape": shape, "data_offsets": [0, volume.nbytes]}}
        header = json.dumps(entry).encode()
        header += b" " * (-len(header) % 8)
        files[-1].write_bytes(len(header).to_bytes(8, "little") + header + volume.tobytes())
    return files


def difference(logits: list[float], reference: list[float]) -> float:
    largest = max(1.0, *(abs(v) for v in reference))
    return max(abs(a - b) for a, b in zip(logits, reference, strict=True)) / largest


def session(
    args: argparse.Namespace, threads: int, model: pathlib.Path, onnx: pathlib.Path, inputs: list[pathlib.Path]
) -> tuple[Json, list[str]]:
    """All of one thread count: start everything, warm everything up, then the rounds."""
    faults: list[str] = []
    running: list[Resident] = []
    try:
        for name in args.only or NAMES:
            log(f"{threads} threads: preparing {name}")
            command = [sys.executable, HERE / "worker.py", name, onnx, "--threads", str(threads), "--cache", OUT]
            command += ["--calibration", *inputs]
            if name == OURS:
                command = [args.darnet, "bench", "inference", "--serve", "--model", model, "--threads", str(threads)]
                command += ["--isa", args.isa] if args.isa else []
            cache = OUT / ("inductor" if args.isa is None else f"inductor-{args.isa}")
            variables = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
            variables |= AVX2_ONLY if args.isa == "avx2" else {}
            try:
                peer = Resident(name, command, variables)
                peer.ask(inputs[0])
                running.append(peer)
            except RuntimeError as error:
                faults.append(f"not run: {error}")
                log(f"  {error}")
        seconds: dict[str, list[float]] = {peer.name: [] for peer in running}
        logits: dict[str, list[list[float]]] = {peer.name: [] for peer in running}
        for number in range(args.rounds):
            for peer in running:
                said = peer.ask(inputs[number % INPUTS])
                seconds[peer.name].append(said["seconds"])
                logits[peer.name].append(said["logits"])
            log(f"{threads} threads: round {number + 1} of {args.rounds}")
        # ONNX Runtime as the yardstick: the plainest float32 path from the same file.
        yardstick = "onnxruntime" if "onnxruntime" in logits else OURS
        rows: Json = {}
        for peer in running:
            name = peer.name
            worst = max(difference(a, b) for a, b in zip(logits[name], logits[yardstick], strict=True))
            exact = name == OURS or peer.ready["precision"] == "f32"
            rows[name] = {
                "median_s": median(seconds[name]),
                "seconds": seconds[name],
                "worst_difference": worst,
                "checked": exact and name != "openvino-int8" and not (args.isa and name in NOT_JUDGED_LIMITED),
                "rss_anon_mib": peer.resident_mib(),
                "ready": peer.ready,
                "logits": logits[name],
            }
            if rows[name]["checked"] and not worst <= TOLERANCE:
                faults.append(f"{name}: logits differ from {yardstick}'s by {worst:.2e}, at most {TOLERANCE}")
        first = [logits[yardstick][i] for i in range(min(INPUTS, args.rounds))]
        spread = max((difference(a, b) for a in first for b in first), default=0.0)
        if len(first) > 1 and spread < 10 * TOLERANCE:
            faults.append(f"the inputs' logits differ by {spread:.2e} only: agreement would show nothing")
        return {"threads": threads, "yardstick": yardstick, "spread_of_inputs": spread, "runtimes": rows}, faults
    finally:
        for peer in running:
            peer.close()


def render(result: Json, gmacs: float, limited: bool) -> str:
    runtimes: Json = result["runtimes"]
    ours = runtimes.get(OURS, {}).get("median_s")
    rows = []
    for name, row in sorted(runtimes.items(), key=lambda item: item[1]["median_s"]):
        ratio = f"{ours / row['median_s']:.3f}" if ours else "-"
        low, high = min(row["seconds"]), max(row["seconds"])
        note = "" if row["checked"] else " (not held to it)"
        precision = str(row["ready"].get("precision", "f32"))
        if name == "openvino-int8":
            precision = f"int8, rest {precision}"
        shown = f"{name} (not limited)" if limited and name in UNLIMITED else name
        rows.append(
            [
                shown,
                precision,
                f"{row['median_s']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{2 * gmacs / row['median_s']:.0f}",
                ratio,
                f"{row['worst_difference']:.1e}{note}",
                f"{row['rss_anon_mib']:.0f}",
            ]
        )
    head = ["runtime", "precision", "median s", "range s", "GFLOP/s (direct)", "darnet / it", "logits differ", "anon MiB"]
    return table(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument("--threads", default="1,2", help="thread counts, one session each (default 1,2)")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--isa", choices=["avx2"], help="keep darnet, OpenVINO and PyTorch to AVX2")
    args = parser.parse_args()
    if args.rounds < 1 or (args.only and set(args.only) - set(NAMES)):
        parser.error("--rounds wants at least 1, --only names from its list")
    OUT.mkdir(exist_ok=True)
    facts = machine()
    model = model_folder(args.darnet, args.model)
    onnx, export = export_onnx(args.darnet, model)
    manifest = tomllib.loads((model / "model.toml").read_text())
    shape = manifest["architecture"]["input_dhw"]
    gmacs = json.loads(darnet(args.darnet, "model", "show", model, "--json"))["macs"] / 1e9
    inputs = write_inputs(shape)
    document: Json = {"schema": "darnet.peers/1", "machine": facts, "model": export["model"], "gmacs": gmacs}
    document |= {"input_dhw": shape, "rounds": args.rounds, "tolerance": TOLERANCE, "isa": args.isa, "sessions": []}
    faults: list[str] = []
    print(f"{describe(facts)}\n\nmodel {export['model']['id']}, input {shape}, {gmacs:.2f} GMAC;", end=" ")
    kept = f", kept to {args.isa}" if args.isa else ""
    print(f"medians of {args.rounds} rounds in turn{kept}\n")
    for threads in [int(n) for n in args.threads.split(",")]:
        result, found = session(args, threads, model, onnx, inputs)
        faults += [f"{threads} threads: {fault}" for fault in found]
        document["sessions"].append(result)
        print(f"{threads} threads, differences to {result['yardstick']}:\n\n{render(result, gmacs, args.isa is not None)}\n", flush=True)
    document["faults"] = faults
    file = args.json or OUT / "peers.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    print(f"figures: {file}")
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

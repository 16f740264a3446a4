"""One runtime with the exported model, resident: reads file names, answers with seconds and logits.

    worker.py RUNTIME MODEL.onnx --threads N [--cache DIR] [--calibration FILE]...

The protocol is that of `darnet bench inference --serve`: a line `{"ready": true, …}`, then for each safetensors file
named on stdin `{"seconds": …, "logits": […]}`. `seconds` spans the runtime's own call, from a float32 array in memory to
all four outputs in memory; reading the file is outside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]
Run = Callable[[Volume], npt.NDArray[np.float32]]
Json = dict[str, Any]


def read_volume(path: str) -> Volume:
    """`volume` of a safetensors file, as [1, 1, D, H, W]."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["volume"]
        first, end = header["data_offsets"]
        data = file.read()[first:end]
    assert header["dtype"] == "F32"
    return np.frombuffer(data, "<f4").reshape(1, 1, *header["shape"][-3:])


def open_openvino(model: pathlib.Path | Any, threads: int, hints: dict[str, str]) -> tuple[Run, Json]:
    import openvino

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        **hints,
    }
    compiled = openvino.Core().compile_model(model, "CPU", config)
    request = compiled.create_infer_request()

    def run(volume: Volume) -> npt.NDArray[np.float32]:
        return request.infer({0: volume}, share_inputs=True, share_outputs=True)["logits"]

    return run, {"precision": compiled.get_property("INFERENCE_PRECISION_HINT").to_string()}


def openvino_f32(args: argparse.Namespace) -> tuple[Run, Json]:
    return open_openvino(args.model, args.threads, {"INFERENCE_PRECISION_HINT": "f32"})


def openvino_default(args: argparse.Namespace) -> tuple[Run, Json]:
    return open_openvino(args.model, args.threads, {})


def openvino_int8(args: argparse.Namespace) -> tuple[Run, Json]:
    """Post-training quantisation by NNCF; kept in the cache, since it takes many inferences."""
    import nncf
    import openvino

    key = hashlib.sha256(args.model.read_bytes())
    for file in args.calibration:
        key.update(file.read_bytes())
    cached = args.cache / f"int8-{key.hexdigest()[:16]}.xml"
    if not cached.is_file():
        volumes = [read_volume(str(file)) for file in args.calibration]
        model = openvino.Core().read_model(args.model)
        quantised = nncf.quantize(model, nncf.Dataset(volumes), subset_size=len(volumes))
        openvino.save_model(quantised, cached, compress_to_fp16=False)
    run, facts = open_openvino(cached, args.threads, {})
    return run, {**facts, "calibration_volumes": len(args.calibration)}


def onnx_runtime(args: argparse.Namespace) -> tuple[Run, Json]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
    return lambda volume: session.run(None, {"volume": volume})[0], {"precision": "f32"}


def torch_network(model: pathlib.Path) -> Any:
    """The network as a torch module, with the file's weights: batch normalisation is folded as in the file."""
    import onnx
    import onnx.numpy_helper
    import torch
    from torch import nn

    file = onnx.load(model)
    arch = json.loads(next(p.value for p in file.metadata_props if p.key == "darnet.architecture"))
    weights = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in file.graph.initializer}

    def fill(module: nn.Module, name: str) -> Any:
        module.load_state_dict({"weight": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]})
        return module

    def conv(name: str, stride: int | tuple[int, int, int]) -> Any:
        c_out, c_in, *kernel = weights[f"{name}.weight"].shape
        padding = tuple((k - 1) // 2 for k in kernel)
        return fill(nn.Conv3d(c_in, c_out, tuple(kernel), stride, padding), name)

    def linear(name: str) -> Any:
        n_out, n_in = weights[f"{name}.weight"].shape
        return fill(nn.Linear(n_in, n_out), name)

    def gate(name: str) -> Any:
        return nn.Sequential(linear(f"{name}.fc.0"), nn.ReLU(), linear(f"{name}.fc.2"), nn.Sigmoid())

    class Block(nn.Module):
        def __init__(self, name: str, stride: int):
            super().__init__()
            self.conv1 = conv(f"{name}.conv1", stride)
            self.conv2 = conv(f"{name}.conv2", 1)
            self.da = gate(f"{name}.da") if arch["depth_attention"] else None
            self.se = gate(f"{name}.se") if arch["channel_attention"] else None
            self.shortcut = conv(f"{name}.downsample.0", stride) if stride > 1 else None

        def scale(self, x: Any) -> Any:
            """The gates' product, from plane means, as the exported graph has it."""
            planes = x.mean((3, 4))
            order = ["da", "se"] if arch["attention_order"] == "depth-first" else ["se", "da"]
            gates = torch.ones_like(planes)
            for kind in order:
                if kind == "da" and self.da is not None:
                    gates = gates * self.da((planes * gates).flatten(1)).reshape(planes.shape)
                if kind == "se" and self.se is not None:
                    gates = gates * self.se((planes * gates).mean(2)).unsqueeze(2)
            return gates[:, :, :, None, None]

        def forward(self, x: Any) -> Any:
            out = self.conv2(torch.relu(self.conv1(x)))
            if self.da is not None or self.se is not None:
                out = out * self.scale(out)
            return torch.relu(out + (x if self.shortcut is None else self.shortcut(x)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv("stem.0", (1, 2, 2))
            strides = {(stage, block): 2 if stage > 1 and block == 0 else 1 for stage in range(1, 5) for block in range(2)}
            self.blocks = nn.Sequential(*(Block(f"layer{s}.{b}", stride) for (s, b), stride in strides.items()))
            self.fc = linear("fc")

        def forward(self, x: Any) -> tuple[Any, Any, Any, Any]:
            features = self.blocks(torch.relu(self.stem(x)))
            pooled = features.mean((2, 3, 4))
            logits = self.fc(pooled)
            return logits, torch.softmax(logits, 1), pooled, features

    return Net().eval().requires_grad_(False)


def torch_runs(args: argparse.Namespace, prepare: Callable[[Any], Any]) -> tuple[Run, Json]:
    """The network prepared in both memory formats; the faster of the two in a trial is kept."""
    import torch

    torch.set_num_threads(args.threads)
    trial = torch.from_numpy(read_volume(str(args.calibration[0])).copy())
    seconds: dict[str, float] = {}
    networks: dict[str, Any] = {}
    for name in ["contiguous_format", "channels_last_3d"]:
        memory_format = getattr(torch, name)
        network = prepare(torch_network(args.model).to(memory_format=memory_format))
        with torch.inference_mode():
            for number in range(3):
                started = time.perf_counter()
                network(trial.contiguous(memory_format=memory_format))
                if number > 0:  # the first one compiles
                    seconds[name] = min(time.perf_counter() - started, seconds.get(name, float("inf")))
        networks[name] = network
    best = min(seconds, key=lambda name: seconds[name])
    network, memory_format = networks[best], getattr(torch, best)
    networks.clear()

    def run(volume: Volume) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return network(torch.from_numpy(volume).contiguous(memory_format=memory_format))[0].numpy()

    return run, {"precision": "f32", "memory_format": best, "trial_s": seconds}


def torch_eager(args: argparse.Namespace) -> tuple[Run, Json]:
    return torch_runs(args, lambda network: network)


def torch_compiled(args: argparse.Namespace) -> tuple[Run, Json]:
    import torch
    import torch._inductor.config

    torch._inductor.config.freezing = True
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        torch._inductor.config.cpp.simdlen = 256

    def compiled(network: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(network, fullgraph=True, dynamic=False)

    return torch_runs(args, compiled)


RUNTIMES: dict[str, tuple[str, Callable[[argparse.Namespace], tuple[Run, Json]]]] = {
    "openvino-f32": ("openvino", openvino_f32),
    "openvino-default": ("openvino", openvino_default),
    "openvino-int8": ("openvino", openvino_int8),
    "onnxruntime": ("onnxruntime", onnx_runtime),
    "torch-eager": ("torch", torch_eager),
    "torch-compiled": ("torch", torch_compiled),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("."))
    parser.add_argument("--calibration", type=pathlib.Path, nargs="*", default=[])
    args = parser.parse_args()
    package, prepare = RUNTIMES[args.runtime]
    started = time.perf_counter()
    run, facts = prepare(args)
    version = __import__(package).__version__
    loaded = time.perf_counter() - started
    say({"ready": True, "runtime": args.runtime, "version": version, "load_s": loaded, **facts})
    for line in sys.stdin:
        volume = np.ascontiguousarray(read_volume(line.rstrip("\n"))).copy()
        started = time.perf_counter()
        logits = run(volume)
        seconds = time.perf_counter() - started
        say({"seconds": seconds, "logits": [float(v) for v in np.asarray(logits).ravel()]})


def say(document: Json) -> None:
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main()

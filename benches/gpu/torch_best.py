"""The fastest DARNet that PyTorch makes on a GPU: one model, one volume, batch 1, several ways, medians of many runs.

    python3 torch_best.py --model DIR [--input FILE] [--serve]      a model folder (model.toml and weights)
    python3 torch_best.py --synthetic SEED [--serve]                full size, the generator's weights and volume
    python3 torch_best.py --check                                   this network against the goldens, on the CPU

The input is a safetensors file with `volume`, f32 in [0, 1], D x H x W; without one, the generator's volume.

Every way has batch normalisation folded into the convolutions and both attentions taken from one reading of the
feature map: with m the mean over rows and columns, the depth gate is f(m) and the channel gate g of the mean over depth
of m * f(m), so that gates, shortcut and ReLU are two more passes instead of six. Outputs are logits, softmax, pooled
vector and last feature map.

    eager           channels last, cudnn.benchmark over all plans
    graph           the same under a CUDA graph
    graph-relu      the same, stem and first convolutions through torch.cudnn_convolution_relu
    graph-ncdhw     contiguous instead of channels last, under a CUDA graph
    autotune-graph  torch.compile, max-autotune-no-cudagraphs, channels last, under a CUDA graph of ours
    reduce-overhead torch.compile in that mode, channels last

What compiles runs in a process of its own and is ended when its time is over. Timed with CUDA events around each run,
input and outputs on the device. On stdout one line of JSON; with --serve that line, then for each line "run N" on stdin
one line with the times of N more runs of the fastest way. Needs PyTorch 2.11 and Python 3.11 or later, numpy,
safetensors.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
import tomllib

import torch
from torch import nn
from torch.nn import functional

HERE = pathlib.Path(__file__).resolve()
ROOT = HERE.parents[2]
EAGER = ["eager", "graph", "graph-relu", "graph-ncdhw"]
COMPILED = ["autotune-graph", "reduce-overhead"]
ON_CPU = ["eager", "eager-ncdhw"]
EPSILON = 1e-5
WARM_UP = 10


def log(message):
    print(message, file=sys.stderr, flush=True)


def goldens():
    """tests/golden/network/make.py: the generator of weights and volumes, and the shapes of the golden cases."""
    spec = importlib.util.spec_from_file_location("goldens", ROOT / "tests/golden/network/make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Convolution(nn.Module):
    """Convolution and batch normalisation as one convolution with a bias, and perhaps a ReLU."""

    def __init__(self, weights, conv, bn, stride, padding, relu):
        super().__init__()
        scale = weights[f"{bn}.weight"].double() / (weights[f"{bn}.running_var"].double() + EPSILON).sqrt()
        weight = weights[f"{conv}.weight"].double() * scale.reshape(-1, 1, 1, 1, 1)
        bias = weights[f"{bn}.bias"].double() - weights[f"{bn}.running_mean"].double() * scale
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.stride, self.padding, self.relu = stride, padding, relu
        self.through_cudnn = False

    def forward(self, x):
        if self.relu and self.through_cudnn:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, self.stride, self.padding, [1, 1, 1], 1)
        y = functional.conv3d(x, self.weight, self.bias, self.stride, self.padding)
        return y.relu_() if self.relu else y


class Gate(nn.Module):
    """Two linear layers and a sigmoid."""

    def __init__(self, weights, name):
        super().__init__()
        for layer in ("0", "2"):
            for part in ("weight", "bias"):
                value = nn.Parameter(weights[f"{name}.fc.{layer}.{part}"].float(), requires_grad=False)
                self.register_parameter(f"{part}{layer}", value)

    def forward(self, means):
        hidden = functional.linear(means, self.weight0, self.bias0).relu_()
        return functional.linear(hidden, self.weight2, self.bias2).sigmoid_()


class Block(nn.Module):
    def __init__(self, weights, name, stride, architecture):
        super().__init__()
        self.conv1 = Convolution(weights, f"{name}.conv1", f"{name}.bn1", [stride] * 3, [1] * 3, True)
        self.conv2 = Convolution(weights, f"{name}.conv2", f"{name}.bn2", [1] * 3, [1] * 3, False)
        self.shortcut = None
        if stride != 1:
            down = f"{name}.downsample"
            self.shortcut = Convolution(weights, f"{down}.0", f"{down}.1", [stride] * 3, [0] * 3, False)
        self.depth = Gate(weights, f"{name}.da") if architecture["depth_attention"] else None
        self.channel = Gate(weights, f"{name}.se") if architecture["channel_attention"] else None
        self.depth_first = architecture["attention_order"] == "depth-first"

    def gate(self, y):
        """What each plane of y (N, C, D) is scaled by."""
        means = y.mean((3, 4))
        scale = None
        gates = [self.depth_gate, self.channel_gate]
        for gate in gates if self.depth_first else reversed(gates):
            factor = gate(means if scale is None else means * scale)
            if factor is not None:
                scale = factor if scale is None else scale * factor
        return scale

    def depth_gate(self, means):
        return None if self.depth is None else self.depth(means.flatten(1)).reshape(means.shape)

    def channel_gate(self, means):
        return None if self.channel is None else self.channel(means.mean(2)).unsqueeze(2)

    def forward(self, x):
        y = self.conv2(self.conv1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if self.depth is None and self.channel is None:
            return (y + shortcut).relu_()
        scale = self.gate(y)
        return torch.addcmul(shortcut, y, scale.reshape(*scale.shape, 1, 1)).relu_()


class Darnet(nn.Module):
    def __init__(self, weights, architecture):
        super().__init__()
        self.stem = Convolution(weights, "stem.0", "stem.1", [1, 2, 2], [1, 3, 3], True)
        blocks = []
        for stage in range(1, 5):
            for block in range(2):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks.append(Block(weights, f"layer{stage}.{block}", stride, architecture))
        self.blocks = nn.Sequential(*blocks)
        self.weight = nn.Parameter(weights["fc.weight"].float(), requires_grad=False)
        self.bias = nn.Parameter(weights["fc.bias"].float(), requires_grad=False)

    def forward(self, x):
        features = self.blocks(self.stem(x))
        pooled = features.mean((2, 3, 4))
        logits = functional.linear(pooled, self.weight, self.bias).float()
        return logits, logits.softmax(1), pooled, features


def load(a):
    """Weights by name, architecture, volume of 1 x 1 x D x H x W."""
    from safetensors.torch import load_file

    if a.model is not None:
        manifest = tomllib.loads((a.model / "model.toml").read_text())
        architecture = manifest["architecture"]
        weights = load_file(a.model / manifest["weights_file"])
        seed = 1
    else:
        generator = goldens()
        architecture = generator.arch(64, [64, 224, 224], ("ca", "da"))
        weights = {name: torch.from_numpy(w) for name, w in generator.tensors(architecture, a.synthetic).items()}
        seed = a.synthetic
    shape = architecture["input_dhw"]
    if a.input is not None:
        volume = load_file(a.input)["volume"].float()
    else:
        count = shape[0] * shape[1] * shape[2]
        volume = torch.from_numpy(goldens().fill(seed, "input", count, 0.5, 0.5))
    return weights, architecture, volume.reshape(1, 1, *shape)


class Way:
    """One way to run the network, ready to be timed."""

    def __init__(self, a, name, weights, architecture, volume):
        dtype = {"fp16": torch.float16, "fp32": torch.float32}[a.precision]
        layout = torch.contiguous_format if name.endswith("ncdhw") else torch.channels_last_3d
        self.on_gpu = a.device != "cpu"
        net = Darnet(weights, architecture).eval().to(a.device, dtype).to(memory_format=layout)
        for module in net.modules():
            if isinstance(module, Convolution):
                module.through_cudnn = name == "graph-relu"
        x = volume.to(a.device, dtype).contiguous(memory_format=layout)
        if name in COMPILED:
            mode = "reduce-overhead" if name == "reduce-overhead" else "max-autotune-no-cudagraphs"
            net = torch.compile(net, mode=mode, fullgraph=True, dynamic=False)
        mark = torch.compiler.cudagraph_mark_step_begin if name == "reduce-overhead" else None

        def run():
            if mark is not None:
                mark()
            return net(x)

        self.run = run
        with torch.no_grad():
            if "graph" in name:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        run()
                torch.cuda.current_stream().wait_stream(side)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.outputs = run()
                self.run = self.replay
            for _ in range(WARM_UP if self.on_gpu else 1):
                outputs = self.run()
            self.logits, self.scores = (outputs[i][0].float().cpu().tolist() for i in (0, 1))

    def replay(self):
        self.graph.replay()
        return self.outputs

    def times_ms(self, runs):
        times = []
        with torch.no_grad():
            for _ in range(runs):
                if self.on_gpu:
                    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    before.record()
                    self.run()
                    after.record()
                    after.synchronize()
                    times.append(before.elapsed_time(after))
                else:
                    start = time.perf_counter()
                    self.run()
                    times.append(1e3 * (time.perf_counter() - start))
        return times

    def measure(self, runs):
        return {**summary(self.times_ms(runs)), "logits": self.logits, "probabilities": self.scores}


def summary(times):
    ordered = sorted(times)
    return {
        "runs": len(ordered),
        "p50_ms": statistics.median(ordered),
        "p95_ms": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "min_ms": ordered[0],
    }


def compiled_apart(a, name):
    """The figures of a way that compiles, from a process that is ended with all its workers when its time is over."""
    command = [sys.executable, str(HERE), *sys.argv[1:], "--only", name]
    command = [argument for argument in command if argument != "--serve"]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(a.compile_workers)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=a.compile_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {"error": f"not ready after {a.compile_seconds} s"}
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": f"ended with status {process.returncode}"}


def serve(way, name):
    for line in sys.stdin:
        words = line.split()
        if not words or words == ["quit"]:
            break
        if len(words) != 2 or words[0] != "run" or not words[1].isdigit() or not 0 < int(words[1]) <= 100_000:
            print(json.dumps({"error": 'expected "run N" or "quit"'}), flush=True)
            continue
        times = way.times_ms(int(words[1]))
        print(json.dumps({"variant": name, **summary(times), "times_ms": times}), flush=True)


def check():
    """Every golden case but the full-size one: logits and pooled vector as the plain PyTorch network has them."""
    generator = goldens()
    torch.manual_seed(0)
    cases = json.loads((ROOT / "tests/golden/network/golden.json").read_text())["cases"]
    worst = 0.0
    count = 0
    for case in cases:
        if case["name"] == "full":
            continue
        architecture, seed = case["architecture"], case["seed"]
        weights = {n: torch.from_numpy(w) for n, w in generator.tensors(architecture, seed).items()}
        shape = architecture["input_dhw"]
        volume = generator.fill(seed, "input", shape[0] * shape[1] * shape[2], 0.5, 0.5).reshape(1, 1, *shape)
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            net = Darnet(weights, architecture).eval().to(memory_format=layout)
            with torch.no_grad():
                logits, scores, pooled, features = net(torch.from_numpy(volume).contiguous(memory_format=layout))
            assert list(features.shape[1:]) == case["feature_shape_cdhw"], case["name"]
            for got, name in ((logits, "logits"), (scores, "scores"), (pooled, "pooled")):
                expected = torch.tensor(case[name])
                difference = (got[0] - expected).abs().max().item() / max(1.0, expected.abs().max().item())
                assert difference <= 1e-4, f"{case['name']}: {name} differ by {difference}"
                worst = max(worst, difference)
            count += 1
    print(json.dumps({"checked": count, "largest_difference": worst}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=pathlib.Path, help="model folder")
    what.add_argument("--synthetic", type=int, metavar="SEED", help="full size, the generator's weights")
    what.add_argument("--check", action="store_true", help="against the goldens")
    parser.add_argument("--input", type=pathlib.Path, help="safetensors file with `volume`")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--runs", type=int, default=100, help="a way, at least 50 on a GPU (default 100)")
    parser.add_argument("--variants", help="comma-separated (default: all that the device has)")
    parser.add_argument("--compile-seconds", type=float, default=180.0, help="a way that compiles (default 180)")
    parser.add_argument("--compile-workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--serve", action="store_true", help="then time more runs on request")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.check:
        check()
        return
    on_gpu = a.device != "cpu"
    if a.runs < (50 if on_gpu else 1):
        parser.error("--runs: at least 50 on a GPU, 1 on the CPU")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 0
    known = EAGER + COMPILED if on_gpu else ON_CPU
    wanted = a.variants.split(",") if a.variants else known
    unknown = set(wanted) - set(known)
    if unknown:
        parser.error(f"--variants: {', '.join(sorted(unknown))}; on this device: {', '.join(known)}")
    weights, architecture, volume = load(a)

    if a.only is not None:
        way = Way(a, a.only, weights, architecture, volume)
        if a.serve:
            serve(way, a.only)
        else:
            print(json.dumps(way.measure(a.runs)), flush=True)
        return

    found, best, kept = {}, None, None
    for name in wanted:
        log(f"{name} ...")
        started = time.perf_counter()
        way = None
        try:
            if name in COMPILED:
                found[name] = compiled_apart(a, name)
            else:
                way = Way(a, name, weights, architecture, volume)
                found[name] = way.measure(a.runs)
        # Whatever keeps one way from running, the others are still worth having.
        except Exception as e:
            found[name] = {"error": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"}
        found[name]["ready_s"] = round(time.perf_counter() - started, 1)
        log(f"{name}: {found[name].get('error') or format(found[name]['p50_ms'], '.3f') + ' ms'}")
        if "error" not in found[name] and (best is None or found[name]["p50_ms"] < found[best]["p50_ms"]):
            best, kept = name, way
        del way
        if on_gpu:
            torch.cuda.empty_cache()
    said = {
        "schema": "darnet.torch-best/1",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "precision": a.precision,
        "input_dhw": architecture["input_dhw"],
        "variants": found,
        "best": best,
        "best_p50_ms": found[best]["p50_ms"] if best else None,
        "probabilities": found[best]["probabilities"] if best else None,
    }
    print(json.dumps(said), flush=True)
    if best is None:
        sys.exit(1)
    if a.serve:
        if kept is None:
            # Compiled again from what its first process left in the compiler's cache.
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(a.compile_workers)
            os.execv(sys.executable, [sys.executable, str(HERE), *sys.argv[1:], "--only", best])
        serve(kept, best)


if __name__ == "__main__":
    main()

"""Training steps of darnet-train against eager PyTorch, in turn, on one machine.

    python3 compare.py DARNET_TRAIN [--input D,H,W] [--batch N] [--width N] [--rounds R] [--steps S] [--threads T]
                       [--device cpu|cuda] [--precision fp32|bf16|fp16] [--channels-last on|off] [--augment]
                       [--json FILE]

Both sides: the same network, Adam at 1e-3, cross-entropy, made-up volumes in half precision, the loss read after every
step. On a GPU: PyTorch runs with autocast, a scaler for fp16, cudnn.benchmark and (by default) channels last, volumes
lie in pinned memory. With --augment both flip, rotate, move and zoom every volume on the device, PyTorch by
affine_grid and grid_sample with the depth as channels.

Each round times both, the order changing from round to round; printed are the medians over all steps, the ratio of the
medians, and the median of the rounds' ratios. Memory of a GPU is what is taken on the card after warming up, less what
was taken before the process began to use it. Needs PyTorch 2.11 with numpy; each side runs in its own process, so that
both find the memory free.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
WARM_GPU, WARM_CPU = 5, 1


def augmented(x):
    """A batch N x D x H x W, each volume in a pose of its own: what darnet-train draws, the PyTorch way."""
    import torch
    import torch.nn.functional as F

    n = x.shape[0]
    angle = math.radians(5.0) * (2.0 * torch.rand(n) - 1.0)
    zoom = 0.9 + 0.2 * torch.rand(n)
    shift = 5.0 / 224.0 * 2.0 * (2.0 * torch.rand(n, 2) - 1.0)
    flip = 1.0 - 2.0 * torch.randint(0, 2, (n, 2)).float()
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1) * flip[:, :, None]
    theta = torch.cat([rotation, shift[:, :, None]], 2).to(x.device, non_blocking=True)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def eager(a):
    import torch

    spec = importlib.util.spec_from_file_location("network", ROOT / "tests/golden/network/make.py")
    network = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(network)
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.backends.cudnn.benchmark = True
    shape = [int(n) for n in a.input.split(",")]
    arch = {
        "base_width": a.width,
        "input_dhw": shape,
        "num_classes": 3,
        "channel_attention": True,
        "depth_attention": True,
        "attention_order": "depth-first",
    }
    gpu = a.device != "cpu"
    if gpu:
        free = torch.cuda.mem_get_info()[0]
    net = network.network(arch).train().to(a.device)
    last = a.channels_last == "on" if a.channels_last else gpu
    if last:
        net = net.to(memory_format=torch.channels_last_3d)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[a.precision]
    scaler = torch.amp.GradScaler(enabled=a.precision == "fp16")
    host = torch.rand(a.batch, *shape).half()
    labels = torch.arange(a.batch) % 3
    if gpu:
        host, labels = host.pin_memory(), labels.pin_memory()

    def step():
        start = time.perf_counter()
        x = host.to(a.device, non_blocking=True).float()
        if a.augment:
            x = augmented(x)
        x = x.unsqueeze(1)
        if last:
            x = x.to(memory_format=torch.channels_last_3d)
        with torch.autocast(x.device.type, dtype=kind, enabled=a.precision != "fp32"):
            loss = torch.nn.functional.cross_entropy(net(x)[0], labels.to(a.device, non_blocking=True))
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        loss.item()
        return 1e3 * (time.perf_counter() - start)

    for _ in range(WARM_GPU if gpu else WARM_CPU):
        step()
    taken = free - torch.cuda.mem_get_info()[0] if gpu else None
    print(json.dumps({"ready": True, "gpu_bytes": taken, "torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"steps_ms": [step() for _ in range(a.steps)]}), flush=True)


class Side:
    """A program that answers every line on its stdin with the times of some steps."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.answer()
        assert self.ready["ready"]

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[0]} ended with {self.process.wait()}")
        return json.loads(line)

    def round(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()["steps_ms"]

    def end(self):
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("program")
    p.add_argument("--input", default="64,224,224")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=2)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", default="fp32")
    p.add_argument("--channels-last", choices=["on", "off"])
    p.add_argument("--augment", action="store_true")
    p.add_argument("--json", help="write the figures to this file, too")
    p.add_argument("--eager", action="store_true", help="one side, used by the script itself")
    a = p.parse_args()
    if a.eager:
        return eager(a)
    same = ["--input", a.input, "--batch", a.batch, "--width", a.width, "--steps", a.steps, "--threads", a.threads]
    same = [*map(str, same), "--device", a.device, "--precision", a.precision]
    if a.channels_last:
        same += ["--channels-last", a.channels_last]
    sides = {
        "darnet-train": [a.program, "bench", "--on-request", *([] if a.augment else ["--no-augment"]), *same],
        "eager PyTorch": [sys.executable, __file__, "eager", "--eager", *(["--augment"] if a.augment else []), *same],
    }
    # One after the other, so that neither finds its kernels while the other computes.
    running = {name: Side(command) for name, command in sides.items()}
    times = {name: [] for name in sides}
    rounds = {name: [] for name in sides}
    for r in range(a.rounds):
        for name in list(sides) if r % 2 == 0 else list(sides)[::-1]:
            steps = running[name].round()
            times[name] += steps
            rounds[name].append(statistics.median(steps))
    memory = {name: side.ready["gpu_bytes"] for name, side in running.items()}
    for side in running.values():
        side.end()
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, t in times.items():
        line = f"{name}: median {medians[name]:.2f} ms a step, {1e3 * a.batch / medians[name]:.2f} images/s"
        gib = "" if memory[name] is None else f", {memory[name] / 2**30:.2f} GiB on the GPU"
        print(f"{line} ({len(t)} steps, {min(t):.2f} to {max(t):.2f} ms){gib}")
    ratios = [x / y for x, y in zip(rounds["darnet-train"], rounds["eager PyTorch"])]
    ratio = medians["darnet-train"] / medians["eager PyTorch"]
    print(f"ratio {ratio:.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f})")
    if a.json:
        figures = {
            "schema": "darnet.train-compare/1",
            "arguments": {k: v for k, v in vars(a).items() if k not in ("program", "json", "eager")},
            "medians_ms": medians,
            "rounds_ms": rounds,
            "ratio": ratio,
            "images_per_s": {name: 1e3 * a.batch / m for name, m in medians.items()},
            "gpu_bytes": memory,
        }
        pathlib.Path(a.json).write_text(json.dumps(figures, indent=1) + "\n")


main()

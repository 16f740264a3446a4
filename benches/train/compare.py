"""Training steps of darnet-train against eager PyTorch, in turn, on one machine.

    python3 compare.py DARNET_TRAIN [--input D,H,W] [--batch N] [--width N] [--rounds R] [--steps S] [--threads T]
                       [--device cpu|cuda] [--precision fp32|bf16|fp16]

Both sides: the same network, Adam at 1e-3, cross-entropy, made-up volumes, no augmentation; on a GPU PyTorch runs with
autocast, a scaler for fp16, and channels last. Each round times both, the order changing from round to round; printed
are the medians over all steps and their ratio. Needs PyTorch 2.11 with numpy; each side runs in its own process, so
that both find the memory free.
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def eager(a):
    import torch

    spec = importlib.util.spec_from_file_location("network", ROOT / "tests/golden/network/make.py")
    network = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(network)
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.backends.cudnn.benchmark = True
    shape = [int(n) for n in a.input.split(",")]
    net = network.network(network.arch(a.width, shape, ("ca", "da"))).train().to(a.device)
    gpu = a.device != "cpu"
    if gpu:
        net = net.to(memory_format=torch.channels_last_3d)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[a.precision]
    scaler = torch.amp.GradScaler(enabled=a.precision == "fp16")
    host = torch.rand(a.batch, 1, *shape).half()
    labels = torch.arange(a.batch) % 3
    times = []
    for step in range((5 if gpu else 1) + a.steps):
        start = time.perf_counter()
        x = host.to(a.device, non_blocking=True).float()
        if gpu:
            x = x.to(memory_format=torch.channels_last_3d)
        with torch.autocast(x.device.type, dtype=kind, enabled=a.precision != "fp32"):
            loss = torch.nn.functional.cross_entropy(net(x)[0], labels.to(a.device))
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        loss.item()
        if step >= (5 if gpu else 1):
            times.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_reserved() if gpu else None
    print(json.dumps({"steps_ms": times, "gpu_bytes": peak}))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("program")
    p.add_argument("--input", default="64,224,224")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--steps", type=int, default=2)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", default="fp32")
    p.add_argument("--eager", action="store_true", help="one side, used by the script itself")
    a = p.parse_args()
    if a.eager:
        return eager(a)
    same = ["--input", a.input, "--batch", a.batch, "--width", a.width, "--steps", a.steps]
    same = [*map(str, same), "--threads", str(a.threads), "--device", a.device, "--precision", a.precision]
    sides = {
        "darnet-train": [a.program, "bench", "--no-augment", *same],
        "eager PyTorch": [sys.executable, __file__, "eager", "--eager", *same],
    }
    times = {name: [] for name in sides}
    memory = {}
    for r in range(a.rounds):
        for name in list(sides) if r % 2 == 0 else list(sides)[::-1]:
            out = json.loads(subprocess.run(sides[name], check=True, stdout=subprocess.PIPE).stdout)
            times[name] += out["steps_ms"]
            memory[name] = out["gpu_bytes"]
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, t in times.items():
        line = f"{name}: median {medians[name]:.1f} ms a step, {1e3 * a.batch / medians[name]:.2f} images/s"
        print(line, f"({len(t)} steps, {min(t):.1f} to {max(t):.1f} ms), GPU bytes {memory[name]}")
    print(f"ratio {medians['darnet-train'] / medians['eager PyTorch']:.3f}")


main()

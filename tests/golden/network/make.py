"""Golden outputs of DARNet in PyTorch.

    python3 make.py              write golden.json beside this file: every case below, in PyTorch on the CPU, f32
    python3 make.py NAME...      only these cases, merged into the present golden.json

Needs numpy, safetensors and PyTorch (made with numpy 2.4 and torch 2.11; any recent one serves, with or without CUDA).
Weights and input volumes come from the counter-based generator described in src/model/synthetic.rs, so that only
outputs are stored: logits, scores, the pooled vector, and of the last feature map its sum, sum of squares, largest
value and 256 elements (indices from the stream "samples"). The full-size case takes about 6 GB of memory and a minute.
"""

import json
import math
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
MASK = (1 << 64) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(z):
    """The finaliser of splitmix64, on an array of uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fnv1a64(name):
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def bits(seed, name, count):
    key = mix(np.array([(seed + fnv1a64(name)) & MASK], dtype=np.uint64))
    index = np.arange(1, count + 1, dtype=np.uint64)
    return mix(key + index * GOLDEN)


def fill(seed, name, count, center, half_width):
    u = (bits(seed, name, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (center + half_width * (2.0 * u - 1.0)).astype(np.float32)


def tensors(arch, seed):
    """Name -> array, every tensor of the architecture."""
    out = {}

    def put(name, shape, center, half_width):
        out[name] = fill(seed, name, math.prod(shape), center, half_width).reshape(shape)

    def kernel(name, shape):
        put(name, shape, 0.0, 1.7320508075688772 * math.sqrt(2.0 / math.prod(shape[1:])))

    def bn(name, c):
        put(f"{name}.weight", (c,), 1.0, 0.3)
        put(f"{name}.bias", (c,), 0.0, 0.2)
        put(f"{name}.running_mean", (c,), 0.0, 0.2)
        put(f"{name}.running_var", (c,), 1.0, 0.5)

    def linear(name, n_out, n_in):
        kernel(f"{name}.weight", (n_out, n_in))
        put(f"{name}.bias", (n_out,), 0.0, 0.1)

    width = arch["base_width"]
    depth = arch["input_dhw"][0]
    kernel("stem.0.weight", (width, 1, 3, 7, 7))
    bn("stem.1", width)
    c_in = width
    for stage in range(1, 5):
        c = width << (stage - 1)
        depth = depth if stage == 1 else (depth + 1) // 2
        for block in range(2):
            name = f"layer{stage}.{block}"
            kernel(f"{name}.conv1.weight", (c, c_in, 3, 3, 3))
            bn(f"{name}.bn1", c)
            kernel(f"{name}.conv2.weight", (c, c, 3, 3, 3))
            bn(f"{name}.bn2", c)
            if arch["depth_attention"]:
                linear(f"{name}.da.fc.0", depth, c * depth)
                linear(f"{name}.da.fc.2", c * depth, depth)
            if arch["channel_attention"]:
                hidden = max(c // 16, 1)
                linear(f"{name}.se.fc.0", hidden, c)
                linear(f"{name}.se.fc.2", c, hidden)
            if stage > 1 and block == 0:
                kernel(f"{name}.downsample.0.weight", (c, c_in, 1, 1, 1))
                bn(f"{name}.downsample.1", c)
            c_in = c
    linear("fc", arch["num_classes"], c_in)
    return out


def network(arch):
    """The network as a torch module whose parameters have the reference implementation's names."""
    import torch
    from torch import nn

    class Gate(nn.Module):
        """Mean over the trailing axes, two linear layers, sigmoid, scale."""

        def __init__(self, ends, hidden, pooled_axes):
            super().__init__()
            self.pooled_axes = pooled_axes
            self.fc = nn.Sequential(
                nn.Linear(ends, hidden), nn.ReLU(), nn.Linear(hidden, ends), nn.Sigmoid()
            )

        def forward(self, x):
            mean = x.mean(dim=self.pooled_axes, keepdim=True)
            return x * self.fc(mean.flatten(1)).reshape(mean.shape)

    class Block(nn.Module):
        def __init__(self, c_in, c, stride, depth):
            super().__init__()
            self.conv1 = nn.Conv3d(c_in, c, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm3d(c)
            self.conv2 = nn.Conv3d(c, c, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm3d(c)
            gates = []
            if arch["depth_attention"]:
                self.da = Gate(c * depth, depth, (3, 4))
                gates.append(self.da)
            if arch["channel_attention"]:
                self.se = Gate(c, max(c // 16, 1), (2, 3, 4))
                gates.append(self.se)
            if arch["attention_order"] == "channel-first":
                gates.reverse()
            self.order = [gate.forward for gate in gates]
            self.downsample = None
            if stride != 1:
                self.downsample = nn.Sequential(
                    nn.Conv3d(c_in, c, 1, stride, bias=False), nn.BatchNorm3d(c)
                )

        def forward(self, x):
            out = torch.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            for gate in self.order:
                out = gate(out)
            return torch.relu(out + (x if self.downsample is None else self.downsample(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            width = arch["base_width"]
            depth = arch["input_dhw"][0]
            self.stem = nn.Sequential(
                nn.Conv3d(1, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
                nn.BatchNorm3d(width),
                nn.ReLU(),
            )
            c_in = width
            for stage in range(1, 5):
                c = width << (stage - 1)
                stride = 1 if stage == 1 else 2
                depth = (depth + stride - 1) // stride
                setattr(
                    self,
                    f"layer{stage}",
                    nn.Sequential(Block(c_in, c, stride, depth), Block(c, c, 1, depth)),
                )
                c_in = c
            self.fc = nn.Linear(c_in, arch["num_classes"])

        def forward(self, x):
            x = self.stem(x)
            for stage in range(1, 5):
                x = getattr(self, f"layer{stage}")(x)
            pooled = x.mean(dim=(2, 3, 4))
            return self.fc(pooled), pooled, x

    return Net().eval()


def run(case):
    import torch

    arch, seed = case["architecture"], case["seed"]
    net = network(arch)
    state = {name: torch.from_numpy(value) for name, value in tensors(arch, seed).items()}
    missing, extra = net.load_state_dict(state, strict=False)
    assert not extra and all(name.endswith("num_batches_tracked") for name in missing), (missing, extra)
    del state
    shape = arch["input_dhw"]
    volume = fill(seed, "input", math.prod(shape), 0.5, 0.5).reshape([1, 1, *shape])
    with torch.no_grad():
        logits, pooled, features = net(torch.from_numpy(volume))
        scores = torch.softmax(logits.double(), 1)
    flat = features.numpy().reshape(-1)
    wide = flat.astype(np.float64)
    samples = bits(seed, "samples", 256) % np.uint64(flat.size)
    return {
        **case,
        "parameters": sum(p.numel() for p in net.parameters()),
        "logits": logits[0].tolist(),
        "scores": scores[0].tolist(),
        "pooled": pooled[0].tolist(),
        "feature_shape_cdhw": list(features.shape[1:]),
        "feature_sum": float(wide.sum()),
        "feature_sum_squares": float((wide * wide).sum()),
        "feature_max": float(wide.max()),
        "feature_samples": flat[samples.astype(np.int64)].tolist(),
    }


def arch(width, shape, attentions, order="depth-first", classes=3):
    return {
        "base_width": width,
        "input_dhw": shape,
        "num_classes": classes,
        "channel_attention": "ca" in attentions,
        "depth_attention": "da" in attentions,
        "attention_order": order,
    }


def cases():
    both = ("ca", "da")
    out = {}
    for name, attentions in [("none", ()), ("ca", ("ca",)), ("da", ("da",)), ("both", both)]:
        for order in ["depth-first", "channel-first"]:
            out[f"odd-{name}-{order}"] = arch(4, [9, 33, 31], attentions, order)
    out["demo"] = arch(8, [32, 96, 96], both)
    out["wide-shallow"] = arch(20, [3, 24, 40], both, "channel-first", 5)
    out["one-plane"] = arch(3, [1, 18, 7], both)
    out["full"] = arch(64, [64, 224, 224], both)
    # the ablations share weights where they share tensors, so that only the ablation tells them apart
    seeds = {"demo": 1, "full": 2026}
    return [
        {"name": name, "seed": seeds.get(name, 11), "architecture": a} for name, a in out.items()
    ]


def main(arguments):
    path = HERE / "golden.json"
    done = {}
    if arguments and path.exists():
        done = {case["name"]: case for case in json.loads(path.read_text())["cases"]}
    everything = cases()
    names = [case["name"] for case in everything]
    unknown = set(arguments) - set(names)
    assert not unknown, f"unknown cases {unknown}, known {names}"
    for case in everything:
        if not arguments or case["name"] in arguments:
            done[case["name"]] = run(case)
            print(case["name"], done[case["name"]]["logits"], file=sys.stderr)
    ordered = [done[name] for name in names if name in done]
    lines = ",\n".join(json.dumps(case) for case in ordered)
    path.write_text('{"schema": "darnet.golden-network/1", "cases": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What `run` runs: GPU tests, every kernel of every convolution, inference beside PyTorch in turn, parity with the cpu
backend, last slice to alert, resampling. Each part may fail alone; the table at the end says which did."""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]

Json = dict[str, Any]
rows: list[str] = []
faults: list[str] = []


def log(message: str) -> None:
    print(f"[{time.monotonic() - started:5.0f} s] {message}", file=sys.stderr, flush=True)


def row(text: str) -> None:
    rows.append(text)
    log(text)


def part(name: str, work: Any) -> Any:
    """Runs one part; what goes wrong in it is a line of the table."""
    log(name)
    try:
        return work()
    except Exception as fault:  # noqa: BLE001: any fault of a part is reported and ends that part alone
        faults.append(f"{name}: {fault}")
        row(f"FAILED {name}: {fault}")
        return None


def out_of(command: list[Any], seconds: float) -> str:
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=seconds, cwd=ROOT
    )
    if done.returncode != 0:
        tail = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise RuntimeError(f"exit {done.returncode}: " + " | ".join(tail))
    return done.stdout


class Resident:
    """A process that answers a line with a line of JSON."""

    def __init__(self, command: list[Any], errors: pathlib.Path):
        with open(errors, "w") as stderr:
            self.process = subprocess.Popen(
                [str(c) for c in command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT,
            )
        self.errors = errors
        self.ready = self.answer()

    def answer(self) -> Json:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                said: Json = json.loads(line)
                if said.get("error"):
                    raise RuntimeError(str(said["error"]))
                return said
        raise RuntimeError("ended: " + " | ".join(self.errors.read_text().strip().splitlines()[-3:]))

    def ask(self, line: str) -> Json:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def median(values: list[float]) -> float:
    return statistics.median(values)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1))]


def tests(arguments: argparse.Namespace) -> None:
    for binary in arguments.tests:
        text = out_of([binary, "--ignored", "--test-threads", "1"], 150)
        said = [line for line in text.splitlines() if line.startswith("test result:")]
        row(f"GPU tests of {pathlib.Path(binary).name.split('-')[0]}: {said[-1] if said else 'no result'}")


def convolutions(arguments: argparse.Namespace) -> None:
    said = json.loads(out_of([arguments.darnet, "bench", "convolutions", "--full-size", "--json"], 150))
    (arguments.out / "convolutions.json").write_text(json.dumps(said, indent=1))
    best: dict[str, dict[str, Json]] = {}
    for trial in said["trials"]:
        if trial["micros"] is None:
            continue
        kind = "cudnn" if trial["kernel"].startswith("cudnn") else "own"
        mine = best.setdefault(trial["convolution"], {})
        if kind not in mine or trial["micros"] < mine[kind]["micros"]:
            mine[kind] = trial
    row("convolution: own kernel, us (TFLOP/s) | cuDNN's best, us | own / cuDNN")
    for name, kinds in best.items():
        own, cudnn = kinds.get("own"), kinds.get("cudnn")
        text = f"  {name}: " + (f"{own['micros']:.1f} ({own['tflops']:.0f})" if own else "none")
        text += f" | {cudnn['micros']:.1f}" if cudnn else " | none"
        text += f" | {own['micros'] / cudnn['micros']:.2f}" if own and cudnn else ""
        row(text)


def inference(arguments: argparse.Namespace) -> None:
    from safetensors.numpy import load_file, save_file  # noqa: F401: both checked before anything is started
    import numpy

    model = arguments.out / "full-size"
    if not (model / "model.toml").is_file():
        out_of([arguments.darnet, "model", "synthetic", "--full-size", "--seed", "1", "--out", model], 120)
    volume = arguments.out / "volume.safetensors"
    generator = numpy.random.default_rng(1)
    save_file({"volume": generator.random((64, 224, 224), dtype=numpy.float32)}, volume)
    serve = [arguments.darnet, "bench", "inference", "--serve", "--model", model]
    peer = Resident(
        [sys.executable, HERE / "torch_best.py", "--model", model, "--input", volume, "--runs", "60", "--serve",
         "--compile-seconds", arguments.compile_seconds],
        arguments.out / "torch.log",
    )
    (arguments.out / "torch.json").write_text(json.dumps(peer.ready, indent=1))
    ours = Resident([*serve, "--backend", "cuda"], arguments.out / "darnet.log")
    for side in (lambda: ours.ask(str(volume)), lambda: peer.ask("run 20")):
        side()
    mine: list[float] = []
    theirs: list[float] = []
    whole: list[float] = []
    answer: Json = {}
    for _ in range(arguments.rounds):
        for _ in range(10):
            answer = ours.ask(str(volume))
            mine.append(answer["device_ms"])
            whole.append(answer["seconds"] * 1e3)
        theirs.extend(peer.ask("run 10")["times_ms"])
    peer.close()
    ours.close()
    for name, variant in peer.ready.get("variants", {}).items():
        row(f"  PyTorch {name}: {variant.get('p50_ms') or variant.get('error')} ms")
    row(
        f"inference, full size, f16, batch 1, on the GPU, {arguments.rounds} rounds of 10 in turn: darnet cuda"
        f" {median(mine):.3f} ms (p99 {quantile(mine, 0.99):.3f}), PyTorch's best ({peer.ready.get('best')})"
        f" {median(theirs):.3f} ms: ratio {median(mine) / median(theirs):.3f}; with copies from and to the host"
        f" {median(whole):.2f} ms"
    )
    cpu = Resident([*serve, "--backend", "cpu"], arguments.out / "cpu.log")
    reference = cpu.ask(str(volume))
    cpu.close()
    apart = max(abs(a - b) for a, b in zip(answer["scores"], reference["scores"], strict=True))
    row(f"probabilities, cuda against cpu: {apart:.1e} apart (bound 2e-3)")
    scores = peer.ready.get("probabilities")
    if scores:
        row(f"probabilities, PyTorch f16 against cpu: {max(abs(a - b) for a, b in zip(scores, reference['scores'])):.1e} apart")


def verify(arguments: argparse.Namespace) -> None:
    text = out_of(
        [arguments.darnet, "engine", "verify", "--model", arguments.out / "full-size", "--backend", "cuda", "--json"], 120
    )
    said = json.loads(text)
    (arguments.out / "verify.json").write_text(text)
    row(
        f"engine verify, cuda against cpu, {said['phantoms']} phantoms: logits {said['max_logit_difference']:.1e},"
        f" probabilities {said['max_probability_difference']:.1e} (bound 2e-3), activation map"
        f" {said['max_cam_difference_of_range']:.1e} of its range (bound 1e-2), same class {said['agreement']}"
    )


def pipeline(arguments: argparse.Namespace) -> None:
    said = json.loads(out_of(
        [arguments.darnet, "bench", "pipeline", "--declared-only", "--model", arguments.out / "full-size", "--backend",
         "cuda", "--runs", arguments.pipeline_runs, "--slices", 300, "--json"], 240,
    ))
    (arguments.out / "pipeline.json").write_text(json.dumps(said, indent=1))
    spread = said["last_slice_to_alert"]
    row(
        f"last slice to alert, 300 slices of 512 x 512 at line rate, declared, {spread['runs']} runs: p50"
        f" {spread['p50_ms']:.2f} ms, p95 {spread['p95_ms']:.2f} ms, p99 {spread['p99_ms']:.2f} ms"
    )
    for line in said.get("breakdown", []):
        row(f"  {line['part']}: p50 {line['p50_ms']:.2f} ms, p99 {line['p99_ms']:.2f} ms")


def resample(arguments: argparse.Namespace) -> None:
    said = json.loads(out_of(
        [arguments.darnet, "bench", "resample", "--model", arguments.out / "full-size", "--backend", "cuda", "--slices",
         300, "--json"], 60,
    ))
    (arguments.out / "resample.json").write_text(json.dumps(said, indent=1))
    row("resampling: " + json.dumps({k: v for k, v in said.items() if isinstance(v, dict)})[:700])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--darnet", type=lambda p: pathlib.Path(p).resolve(), required=True, help="the binary")
    parser.add_argument("--tests", type=lambda p: pathlib.Path(p).resolve(), action="append", default=[],
                        help="a test binary whose ignored tests named gpu are run")
    parser.add_argument("--out", type=lambda p: pathlib.Path(p).resolve(), default=HERE / ".out")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of 10 inferences a side")
    parser.add_argument("--compile-seconds", type=int, default=60, help="for each way of PyTorch that compiles")
    parser.add_argument("--pipeline-runs", type=int, default=100)
    parser.add_argument("--skip", default="", help="parts to leave out, separated by commas")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpu = part("GPU", lambda: out_of(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], 30).strip())
    row(f"machine: {gpu}; darnet commit {subprocess.run(['git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD'], stdout=subprocess.PIPE, text=True).stdout.strip() or 'unknown'}")
    for work in (tests, convolutions, inference, verify, resample, pipeline):
        if work.__name__ not in arguments.skip.split(","):
            part(work.__name__, lambda: work(arguments))
    print(f"\ntook {time.monotonic() - started:.0f} s\n")
    print("\n".join(rows))
    (arguments.out / "table.txt").write_text("\n".join(rows) + "\n")
    if faults:
        print(f"\n{len(faults)} part(s) failed", file=sys.stderr)
    return 1 if faults else 0


started = time.monotonic()
if __name__ == "__main__":
    sys.exit(main())

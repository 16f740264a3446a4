"""What both comparisons share: the model, the processes that are measured, the machine, the tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / ".out"
PEERS = ["openvino", "onnxruntime", "torch", "nncf", "onnx", "numpy", "scipy", "pydicom"]

Json = dict[str, Any]


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--darnet", type=pathlib.Path, required=True, help="the binary (`run` builds and passes it)")
    parser.add_argument("--model", type=pathlib.Path, help="model folder; a generated full-size one when absent")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, at least 1 (default 5)")
    parser.add_argument("--json", type=pathlib.Path, help="where the figures go (default: in .out/)")


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def darnet(binary: pathlib.Path, *arguments: str | os.PathLike[str]) -> str:
    return subprocess.run([binary, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def model_folder(binary: pathlib.Path, wanted: pathlib.Path | None) -> pathlib.Path:
    """The folder asked for, or a full-size model with generated weights, made once."""
    if wanted is not None:
        return wanted.resolve()
    folder = OUT / "full-size"
    if not (folder / "model.toml").is_file():
        log("making a full-size model with generated weights")
        darnet(binary, "model", "synthetic", "--full-size", "--seed", "1", "--out", folder)
    return folder


def export_onnx(binary: pathlib.Path, model: pathlib.Path) -> tuple[pathlib.Path, Json]:
    """The model as float32 ONNX, and what the export says of it."""
    OUT.mkdir(exist_ok=True)
    file = OUT / f"{model.name}.onnx"
    said = json.loads(darnet(binary, "model", "export", model, "--onnx", file, "--force", "--json"))
    return file, said


class Resident:
    """A process that says it is ready, then answers each line of input with a line of JSON."""

    def __init__(self, name: str, command: list[str | os.PathLike[str]], environment: dict[str, str] | None = None):
        self.name = name
        self.log = OUT / f"{name}.log"
        with open(self.log, "w") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        self.ready = self.answer()

    def answer(self) -> Json:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            # A runtime may print to stdout on its own.
            if line.startswith("{"):
                said: Json = json.loads(line)
                if "error" in said:
                    self.close()
                    raise RuntimeError(f"{self.name}: {said['error']}")
                return said
        tail = self.log.read_text().strip().splitlines()[-5:]
        raise RuntimeError(f"{self.name} ended: " + " | ".join(tail))

    def ask(self, line: str | os.PathLike[str]) -> Json:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{os.fspath(line)}\n")
        self.process.stdin.flush()
        return self.answer()

    def resident_mib(self) -> float:
        """Anonymous memory now."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def machine() -> Json:
    """CPU, kernel, commit, versions: what a figure means nothing without."""
    cpu = "unknown"
    flags: list[str] = []
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
        elif line.startswith("flags"):
            flags = line.split(":", 1)[1].split()
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], stdout=subprocess.PIPE, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], stdout=subprocess.PIPE, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "isa": [flag for flag in flags if flag.startswith(("avx", "amx", "fma"))],
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "commit": commit + ("+changes" if changed else ""),
        "load_1min_before": os.getloadavg()[0],
        "started_unix_s": time.time(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PEERS},
    }


def median(values: list[float]) -> float:
    return statistics.median(values)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe(facts: Json) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, load {facts['load_1min_before']:.2f} before;"
        f" darnet commit {facts['commit'][:12]}{'+changes' if '+' in facts['commit'] else ''}; {versions}"
    )

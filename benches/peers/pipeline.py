"""Last slice to answer: storescp, pydicom, SciPy and OpenVINO against `darnet serve`, the same series pushed to each.

Both are up, loaded and warm before the first push. The peer's time starts when the last C-STORE was answered, which is
later than its last byte, and ends when it prints its logits; it starts to work when the association is released.
Ours is what the result says of itself: from the last byte of the last slice to the commit of the alert, the grace time
included.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

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

# An outcome takes the grace time and one inference; on one slow core that is below a minute.
OUTCOME_WITHIN_S = 300


class Daemon:
    """`darnet serve` on free ports with its own data folder."""

    def __init__(self, binary: pathlib.Path, model: pathlib.Path, threads: int, grace_ms: int, folder: pathlib.Path):
        data = folder / "data"
        data.mkdir()
        config = folder / "darnet.toml"
        config.write_text(
            f"data_dir = {json.dumps(str(data))}\n"
            f"[model]\npath = {json.dumps(str(model))}\nbackend = \"cpu\"\nthreads = {threads}\n"
            f"[dicom]\nbind = \"127.0.0.1:0\"\n[web]\nbind = \"127.0.0.1:0\"\n"
            f"[assembly]\ngrace_ms = {grace_ms}\n"
        )
        with open(OUT / "serve.log", "w") as stderr:
            self.process = subprocess.Popen(
                [binary, "serve", "--config", config], stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        if not first:
            raise RuntimeError(f"the daemon did not start, see {OUT / 'serve.log'}")
        said = json.loads(first)
        self.dicom, self.web = said["dicom"], said["web"]

    def results(self) -> list[Json]:
        with urllib.request.urlopen(f"http://{self.web}/api/results", timeout=60) as answer:
            return json.load(answer)["results"]

    def wait_new(self, known: set[str]) -> Json:
        """The first outcome that was not there before."""
        until = time.monotonic() + OUTCOME_WITHIN_S
        while time.monotonic() < until:
            for result in self.results():
                if result["result_uid"] not in known:
                    return result
            time.sleep(0.1)
        raise RuntimeError(f"no outcome within {OUTCOME_WITHIN_S} s")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def push(binary: pathlib.Path, series: pathlib.Path, to: str, rate: float) -> Json:
    said: Json = json.loads(darnet(binary, "send", series, "--to", to, "--rate", str(rate), "--json"))
    if said["failed"]:
        raise RuntimeError(f"{said['failed']} slices were not stored")
    return said


def make_series(args: argparse.Namespace, folder: pathlib.Path) -> list[pathlib.Path]:
    """One patient a round: a series pushed a second time would be known already."""
    log(f"making {args.rounds + 1} series of {args.slices} slices")
    size = ["--slices", str(args.slices), "--size", "512"]
    count = ["--class", "covid", "--count", str(args.rounds + 1), "--seed", "1"]
    listed = darnet(args.darnet, "phantom", "--out", folder, *count, *size)
    series = [pathlib.Path(line.split("\t")[0]) for line in listed.splitlines()]
    return [path if path.is_dir() else path.parent for path in series]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_common_arguments(parser)
    parser.add_argument("--threads", type=int, default=2, help="threads of either network (default 2)")
    parser.add_argument("--slices", type=int, default=300, help="slices of a series (default 300)")
    parser.add_argument("--rate", type=float, default=30.0, help="slices a second (default 30)")
    parser.add_argument("--grace-ms", type=int, default=2000, help="ours: the configuration's default")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    facts = machine()
    model = model_folder(args.darnet, args.model)
    onnx, export = export_onnx(args.darnet, model)
    rounds: list[Json] = []
    with tempfile.TemporaryDirectory(prefix="peers-", dir=OUT) as temporary:
        folder = pathlib.Path(temporary)
        spool = folder / "spool"
        spool.mkdir()
        series = make_series(args, folder / "series")
        options = ["--threads", str(args.threads), "--spool", spool]
        peer = Resident("peer-pipeline", [sys.executable, HERE / "peer_pipeline.py", onnx, model, *options])
        daemon = Daemon(args.darnet, model, args.threads, args.grace_ms, folder)
        known: set[str] = set()
        try:
            # The first series of each side is not counted.
            for number, path in enumerate(series):
                assert peer.process.stdin is not None
                peer.process.stdin.write("\n")
                peer.process.stdin.flush()
                sent = push(args.darnet, path, f"127.0.0.1:{peer.ready['port']}", args.rate)
                theirs = peer.answer()
                theirs["last_slice_to_answer_s"] = theirs["printed_unix_s"] - sent["last_answer_unix_s"]
                sent = push(args.darnet, path, daemon.dicom, args.rate)
                result = daemon.wait_new(known)
                known.add(result["result_uid"])
                report = result["report"]
                if report["outcome"] != "result" or report["slices"] != args.slices:
                    raise RuntimeError(f"expected a result of {args.slices} slices, got {report}")
                if theirs["slices"] != args.slices:
                    raise RuntimeError(f"the peer read {theirs['slices']} slices of {args.slices}")
                ours = {
                    "last_slice_to_alert_s": result["latency"]["last_slice_to_alert_ms"] / 1e3,
                    "completion_wait_s": result["latency"]["completion_wait_ms"] / 1e3,
                    "answer_to_document_s": result["created_at_ms"] / 1e3 - sent["last_answer_unix_s"],
                    "stages_ms": report["latency_ms"],
                    "logits": report["logits"],
                    "cause": result["completion"]["cause"],
                }
                if number > 0:
                    rounds.append({"peer": theirs, "darnet": ours})
                label = f"round {number} of {args.rounds}" if number else "warm-up"
                log(f"{label}: {theirs['last_slice_to_answer_s']:.2f} s, {ours['last_slice_to_alert_s']:.2f} s")
                shutil.rmtree(path)
        finally:
            peer.close()
            daemon.close()
    theirs_s = [r["peer"]["last_slice_to_answer_s"] for r in rounds]
    ours_s = [r["darnet"]["last_slice_to_alert_s"] for r in rounds]
    waits_s = [r["darnet"]["completion_wait_s"] for r in rounds]
    ratio = median(ours_s) / median(theirs_s)
    stages = {name: median([r["peer"]["stages_s"][name] for r in rounds]) for name in rounds[0]["peer"]["stages_s"]}
    infer_s = median([r["darnet"]["stages_ms"]["infer"] or 0.0 for r in rounds]) / 1e3
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
    print(f"{describe(facts)}\n")
    print(f"model {export['model']['id']}, {args.slices} slices of 512 x 512 at {args.rate:g} a second, {args.threads} threads,")
    print(f"medians of {args.rounds} rounds in turn, seconds:\n")
    rows = [
        ["storescp, pydicom, SciPy, OpenVINO f32", f"{median(theirs_s):.3f}", f"{min(theirs_s):.3f} to {max(theirs_s):.3f}", parts],
        [
            "darnet serve",
            f"{median(ours_s):.3f}",
            f"{min(ours_s):.3f} to {max(ours_s):.3f}",
            f"completion wait {median(waits_s):.2f} (grace {args.grace_ms} ms), infer {infer_s:.2f}",
        ],
    ]
    print(table(["pipeline", "last slice to answer", "range", "of which"], rows))
    print(f"\ndarnet / peer: {ratio:.3f}")
    document = {
        "schema": "darnet.peers-pipeline/1",
        "machine": facts,
        "model": export["model"],
        "threads": args.threads,
        "slices": args.slices,
        "rate": args.rate,
        "grace_ms": args.grace_ms,
        "ratio": ratio,
        "rounds": rounds,
    }
    file = args.json or OUT / "pipeline.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    print(f"figures: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

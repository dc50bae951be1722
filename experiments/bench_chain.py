"""Time of the whole chain, stage by stage, and of the first answer of the command line.

    python experiments/bench_chain.py --out /tmp/chain --json experiments/results/chain.json

Runs `odis-path demo` in an empty folder (the limit is 10 minutes on 2 cores) and `odis-path --help` eleven times in turn with
a bare `python -c pass` (the limit is 0.5 s). Prints a table and, with --json, writes it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

DEMO_LIMIT_S = 600.0
HELP_LIMIT_S = 0.5


def seconds(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def measure_help(runs: int = 11) -> dict[str, float]:
    """Median seconds of --help and of a bare interpreter, interleaved."""
    ours, bare = [], []
    for _ in range(runs):
        ours.append(seconds([sys.executable, "-m", "odis_path", "--help"]))
        bare.append(seconds([sys.executable, "-c", "pass"]))
    return {"help_s": statistics.median(ours), "bare_python_s": statistics.median(bare)}


def measure_demo(out: Path) -> dict[str, float]:
    """Seconds of each stage of the demo in an empty folder, and of the whole command."""
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "odis_path", "demo", "--out", str(out)], check=True)
    whole = time.perf_counter() - begin
    return {**json.loads((out / "timings.json").read_text()), "whole": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out_bench"), help="folder for the demo, emptied first")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    stages = measure_demo(options.out)
    whole = stages.pop("whole")
    answer = measure_help()
    print(f"\n{'stage':<12}{'seconds':>10}{'share':>8}")
    for name, value in stages.items():
        print(f"{name:<12}{value:>10.1f}{value / whole:>8.0%}")
    print(f"{'whole':<12}{whole:>10.1f}  {whole / DEMO_LIMIT_S:.2f} of the limit of {DEMO_LIMIT_S:.0f} s")
    print(
        f"--help: {answer['help_s']:.3f} s, {answer['help_s'] / HELP_LIMIT_S:.2f} of the limit of {HELP_LIMIT_S} s "
        f"(bare python {answer['bare_python_s']:.3f} s), medians of 11, interleaved"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"stages_s": stages, "whole_s": whole, **answer, "cores": os.cpu_count(), "python": sys.version.split()[0]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Times pangu_locmoe against Hugging Face Mixtral and against its own dense twin on this machine's
CPU.

Every contestant is a process of its own, held on the same cores with the same number of threads. In
each round each takes a few training steps while the others are stopped, so slow minutes of a shared
machine hit all of them; a ratio is formed inside a round. `bash scripts/benchmark.sh` sets up what
this needs; docs/performance.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from benchmark.hf import Parser, count

SCRIPTS = Path(__file__).resolve().parents[1]
THREADS = 2
TOKENS_PER_STEP = 4 * 256
QUIET_CORES = 0.15  # a turn is quiet when other processes kept less than this many cores busy


@dataclass(frozen=True)
class Side:
    """One contestant: its name, what it is, whether it is Hugging Face's, and its flags."""

    name: str
    what: str
    hugging_face: bool
    flags: Tuple[str, ...]


SIDES = (
    Side("hf", "Mixtral, 4 sparse layers, learned router, dropless", True, ()),
    Side("hf-dense", "Mistral, 4 dense layers", True, ("--experts", "0")),
    Side("switch-5/4", "4 sparse layers + query layer, learned router", False, ()),
    Side(
        "switch-4/3",
        "3 sparse layers + query layer, learned router",
        False,
        ("--num-layers", "4", "--num-moe-layers", "3"),
    ),
    Side("locmoe-5/4", "4 sparse layers + query layer, GrAP", False, ("--router", "locmoe")),
    Side("dropless-5/4", "as switch-5/4, no token dropped", False, ("--capacity", "dropless")),
    Side("dense-5", "4 dense layers + query layer", False, ("--num-moe-layers", "0")),
    Side(
        "dense-4",
        "3 dense layers + query layer",
        False,
        ("--num-layers", "4", "--num-moe-layers", "0"),
    ),
)

# (what the ratio says, side whose time is divided, side it is divided by)
RATIOS = (
    ("speed: switch-5/4 vs hf", "hf", "switch-5/4"),
    ("speed: locmoe-5/4 vs hf", "hf", "locmoe-5/4"),
    ("speed: dropless-5/4 vs hf", "hf", "dropless-5/4"),
    ("speed: switch-4/3 vs hf (one sparse layer less)", "hf", "switch-4/3"),
    ("speed: dense-5 vs hf-dense", "hf-dense", "dense-5"),
    ("step time: switch-5/4 / dense-5", "switch-5/4", "dense-5"),
    ("step time: locmoe-5/4 / dense-5", "locmoe-5/4", "dense-5"),
    ("step time: hf / hf-dense", "hf", "hf-dense"),
    ("step time: dense-5 / dense-4 (what one dense layer adds)", "dense-5", "dense-4"),
)

MEMORY_SIDES = (
    Side("switch-5/4, d 256", "", False, ()),
    Side("switch-5/4, d 512", "", False, ("--hidden", "512", "--ffn", "2048", "--heads", "8")),
    Side("hf, d 256", "", True, ()),
    Side("hf, d 512", "", True, ("--hidden", "512", "--intermediate", "1376", "--heads", "8")),
)

GATES = ("256,8", "5120,16")


class BenchmarkError(Exception):
    """A contestant could not be run; the message is one line and its log's end."""


@dataclass
class Contestant:
    """A running side. `rounds` holds its answers."""

    side: Side
    process: subprocess.Popen
    log: Any
    start_seconds: float
    ready: Dict[str, Any]
    rounds: List[Dict[str, Any]] = field(default_factory=list)

    def run(self, steps: int) -> Dict[str, Any]:
        """Train `steps` steps while awake; the answer also says how many cores other processes
        kept busy meanwhile.
        """
        busy = _busy_seconds()
        begin = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(f"run {steps}\n")
        self.process.stdin.flush()
        answer = json.loads(_line(self.process, self.log, self.side))
        self.process.send_signal(signal.SIGSTOP)
        if "error" in answer:
            raise BenchmarkError(f"{self.side.name}: {answer['error']}")
        answer["cores_of_others"] = max(0.0, _busy_seconds() - busy - answer["cpu_seconds"]) / (
            time.perf_counter() - begin
        )
        return dict(answer)

    def close(self) -> None:
        """End the process, awake or not."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def _busy_seconds() -> float:
    """CPU seconds all processes of this machine have used since it started; 0 where /proc/stat
    does not say.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, interrupt, soft = (
        int(word) for word in stat.read_text(encoding="utf-8").split()[1:8]
    )
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def start(side: Side, hf_python: str) -> Contestant:
    """Start a side, wait for its first step and stop it.

    Raises BenchmarkError with the end of its log.
    """
    begin = time.perf_counter()
    log, process = _spawn(side.hugging_face, side.flags, hf_python)
    try:
        line = _line(process, log, side)
        seconds = time.perf_counter() - begin
        contestant = Contestant(side, process, log, seconds, parse_ready(line))
    except BaseException:
        process.kill()
        raise
    process.send_signal(signal.SIGSTOP)
    return contestant


def parse_ready(line: str) -> Dict[str, Any]:
    """'ready {json}' -> its dict. Raises BenchmarkError for anything else."""
    word, _, text = line.partition(" ")
    if word != "ready":
        raise BenchmarkError(f"expected 'ready ...' from a contestant, got {line.strip()!r}")
    ready: Dict[str, Any] = json.loads(text)
    return ready


def child_environment(base: Dict[str, str]) -> Dict[str, str]:
    """Two threads for every library, quiet MindSpore, the package of this checkout."""
    threads = {
        name: str(THREADS)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    path = os.pathsep.join(
        part for part in (str(SCRIPTS), str(SCRIPTS.parent), base.get("PYTHONPATH", "")) if part
    )
    return {**base, **threads, "PYTHONPATH": path, "GLOG_v": "3", "HF_HUB_OFFLINE": "1"}


def _spawn(
    hugging_face: bool, flags: Sequence[str], hf_python: str
) -> Tuple[Any, subprocess.Popen]:
    program = (
        [hf_python, "-m", "benchmark.hf", "--threads", str(THREADS)]
        if hugging_face
        else [sys.executable, "-m", "benchmark.ours"]
    )
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
    process = subprocess.Popen(
        [*program, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=child_environment(dict(os.environ)),
    )
    return log, process


def _line(process: subprocess.Popen, log: Any, side: Side) -> str:
    assert process.stdout is not None
    # MindSpore prints its own lines to stdout now and then: only the protocol's are taken.
    while True:
        line = process.stdout.readline()
        if not line:
            log.seek(0)
            tail = " | ".join(log.read().strip().splitlines()[-3:])
            raise BenchmarkError(f"{side.name} ended early: {tail or 'no message'}")
        if line.startswith(("ready ", "gate ", "{")):
            return str(line)


def spread(values: Sequence[float]) -> Dict[str, float]:
    """min, median and max."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(answers: Dict[str, List[Dict[str, Any]]]) -> Dict[str, Dict[str, Any]]:
    """Each of RATIOS with its spread.

    Args:
        answers: the answers of each side, one for each round.

    Returns:
        For each ratio: `rounds`, formed inside each round; min, median, max of them; `best`, of
        both sides' fastest rounds; `quiet_rounds`, in how many rounds both had the machine to
        themselves, and `quiet_median` over those (None without).
    """
    result: Dict[str, Dict[str, Any]] = {}
    for name, above, below in RATIOS:
        if above not in answers or below not in answers:
            continue
        pairs = list(zip(answers[above], answers[below]))
        rounds = [_step_seconds(a) / _step_seconds(b) for a, b in pairs]
        quiet = [
            ratio
            for ratio, pair in zip(rounds, pairs)
            if max(answer["cores_of_others"] for answer in pair) < QUIET_CORES
        ]
        result[name] = {
            "rounds": rounds,
            **spread(rounds),
            "best": min(map(_step_seconds, answers[above]))
            / min(map(_step_seconds, answers[below])),
            "quiet_rounds": len(quiet),
            "quiet_median": statistics.median(quiet) if quiet else None,
        }
    return result


def _step_seconds(answer: Dict[str, Any]) -> float:
    return float(answer["wall_seconds"] / answer["steps"])


def summarise(contestant: Contestant) -> Dict[str, Any]:
    """One side's numbers, with its raw rounds."""
    speeds = [
        answer["steps"] * TOKENS_PER_STEP / answer["wall_seconds"] for answer in contestant.rounds
    ]
    cpu = [
        answer["cpu_seconds"] / (answer["steps"] * TOKENS_PER_STEP) * 1e6
        for answer in contestant.rounds
    ]
    return {
        "what": contestant.side.what,
        "parameters": contestant.ready["parameters"],
        "versions": contestant.ready["versions"],
        "start_to_first_step_seconds": contestant.start_seconds,
        "first_step_seconds": contestant.ready["first_step_seconds"],
        "peak_memory_mb": contestant.rounds[-1]["peak_memory_mb"],
        "tokens_per_second": spread(speeds),
        "cpu_us_per_token": spread(cpu),
        "rounds": contestant.rounds,
    }


def measure_training(
    sides: Sequence[Side], rounds: int, steps: int, hf_python: str
) -> Tuple[Dict[str, Any], List[Dict[str, float]]]:
    """Interleaved rounds of all sides; also the load average before each round."""
    contestants: List[Contestant] = []
    loads = []
    try:
        for side in sides:
            contestants.append(start(side, hf_python))
            print(
                f"  {side.name}: first step {contestants[-1].start_seconds:.1f} s after its start",
                flush=True,
            )
        for contestant in contestants:
            contestant.run(2)
        for turn in range(rounds):
            loads.append({"round": turn + 1, "load_average_1min": os.getloadavg()[0]})
            # Every other round goes backwards, so that nobody always follows the same neighbour.
            for contestant in contestants if turn % 2 == 0 else contestants[::-1]:
                contestant.rounds.append(contestant.run(steps))
            print(
                (
                    f"  round {turn + 1} of {rounds}, load average "
                    f"{loads[-1]['load_average_1min']:.2f}"
                ),
                flush=True,
            )
        return {contestant.side.name: summarise(contestant) for contestant in contestants}, loads
    finally:
        for contestant in contestants:
            contestant.close()


def measure_memory(hf_python: str, chosen: Sequence[str]) -> Dict[str, Any]:
    """Peak memory after three steps at two sizes, one process at a time, and what a parameter
    costs between them; of the sides that were chosen.
    """
    result: Dict[str, Any] = {}
    for side in MEMORY_SIDES:
        if side.name.partition(",")[0] not in chosen:
            continue
        contestant = start(side, hf_python)
        try:
            peak = contestant.run(2)["peak_memory_mb"]
        finally:
            contestant.close()
        parameters = contestant.ready["parameters"]
        result[side.name] = {
            "parameters": parameters,
            "weights_and_moments_mb": parameters * 12 / 1e6,
            "peak_memory_mb": peak,
        }
    for who in ("switch-5/4", "hf"):
        if who not in chosen:
            continue
        small = result[f"{who}, d 256"]
        large = result[f"{who}, d 512"]
        growth = (
            (large["peak_memory_mb"] - small["peak_memory_mb"])
            * 1e6
            / (large["parameters"] - small["parameters"])
        )
        result[f"{who}, bytes for each further parameter"] = growth
    return result


def measure_gates() -> List[Dict[str, Any]]:
    """Both gates at the two sizes."""
    side = Side("gates", "", False, ())
    result = []
    for size in GATES:
        log, process = _spawn(False, ("--gate", size), sys.executable)
        try:
            times = json.loads(_line(process, log, side).partition(" ")[2])
        finally:
            process.kill()
            process.wait()
            log.close()
        times["grap_over_dense"] = spread(
            [grap / dense for grap, dense in zip(times["grap_ms"], times["dense_ms"])]
        )
        result.append(times)
    return result


def machine() -> Dict[str, Any]:
    """What it ran on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def print_report(result: Dict[str, Any]) -> None:
    """The result as tables."""
    where = result["machine"]
    versions: Dict[str, str] = {}
    for side in result["sides"].values():
        versions.update(side["versions"])
    loads = [row["load_average_1min"] for row in result["load"]]
    print(
        f"\n{where['cpu']}, {where['cores']} cores, {where['threads']} threads each; load "
        f"average {min(loads):.2f} to {max(loads):.2f}, the benchmark's own included"
    )
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(
        f"{TOKENS_PER_STEP} tokens a step, d 256, 4 heads, 8 experts, top-1, vocabulary "
        "4,096; random tokens\n"
    )
    print(
        f"{'':14}{'parameters':>12}{'tokens/s (min-max)':>25}{'CPU us/token':>14}{'peak MB':>9}{'start s':>9} "
        " what"
    )
    for name, side in result["sides"].items():
        speed = side["tokens_per_second"]
        text = f"{speed['median']:,.0f} ({speed['min']:,.0f}-{speed['max']:,.0f})"
        print(
            f"{name:14}{side['parameters']:>12,}{text:>25}{side['cpu_us_per_token']['median']:>14.0f}{side['peak_memory_mb']:>9.0f}"
            f"{side['start_to_first_step_seconds']:>9.1f}  {side['what']}"
        )
    print(f"\n{'':60}{'median':>8}{'min':>8}{'max':>8}{'best':>8}  quiet rounds")
    for name, ratio in result["ratios"].items():
        quiet = (
            f"{ratio['quiet_median']:.2f} in {ratio['quiet_rounds']}"
            if ratio["quiet_rounds"]
            else "none"
        )
        print(
            f"{name:60}{ratio['median']:>8.2f}{ratio['min']:>8.2f}{ratio['max']:>8.2f}{ratio['best']:>8.2f} "
            f" {quiet}"
        )
    for gate in result["gates"]:
        grap = statistics.median(gate["grap_ms"])
        dense = statistics.median(gate["dense_ms"])
        ratio = gate["grap_over_dense"]
        name = (
            f"gate time, d {gate['hidden_size']}, {gate['num_experts']} experts: GrAP "
            f"{grap:.2f} / dense {dense:.2f} ms"
        )
        print(f"{name:60}{ratio['median']:>8.2f}{ratio['min']:>8.2f}{ratio['max']:>8.2f}")
    print()
    for name, row in result["memory"].items():
        if isinstance(row, dict):
            print(
                f"memory, {name}: peak {row['peak_memory_mb']:,.0f} MB, of it weights and "
                f"moments {row['weights_and_moments_mb']:,.0f} MB"
            )
        else:
            print(f"memory, {name}: {row:.1f}")


def output_file(text: str) -> Path:
    """A file that can be written: its folder exists."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in an existing folder, not {text!r}")
    return path


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(str(__doc__).splitlines()[0])
    parser.add_argument(
        "--rounds", type=count, default=10, help="rounds; every side runs once in each"
    )
    parser.add_argument(
        "--steps", type=count, default=4, help="training steps of a side in a round"
    )
    parser.add_argument(
        "--output",
        type=output_file,
        default=None,
        help="write everything, raw rounds included, to this JSON file",
    )
    parser.add_argument(
        "--hf-python", default=sys.executable, help="interpreter that has torch and transformers"
    )
    parser.add_argument(
        "--sides",
        default=None,
        help="only these, comma-separated: " + ", ".join(side.name for side in SIDES),
    )
    parser.add_argument("--check", action="store_true", help="read the flags and end")
    arguments = parser.parse_args(argv)
    names = [side.name for side in SIDES] if arguments.sides is None else arguments.sides.split(",")
    unknown = sorted(set(names) - {side.name for side in SIDES})
    if unknown:
        parser.error(f"argument --sides: unknown {', '.join(unknown)}")
    arguments.sides = [side for side in SIDES if side.name in names]
    return arguments


def main() -> int:
    """Measure, print, write."""
    arguments = parse_arguments()
    if arguments.check:
        return 0
    # A stopped contestant outlives its driver: being ended must still run the clean-up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if hasattr(os, "sched_setaffinity"):
        # Inherited by the contestants: no library may take more cores than the others.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    result: Dict[str, Any] = {
        "machine": machine(),
        "steps_in_a_round": arguments.steps,
        "tokens_in_a_step": TOKENS_PER_STEP,
    }
    try:
        print("training", flush=True)
        result["sides"], result["load"] = measure_training(
            arguments.sides, arguments.rounds, arguments.steps, arguments.hf_python
        )
        result["ratios"] = ratios({name: side["rounds"] for name, side in result["sides"].items()})
        print("gates", flush=True)
        result["gates"] = measure_gates()
        print("memory", flush=True)
        result["memory"] = measure_memory(
            arguments.hf_python, [side.name for side in arguments.sides]
        )
    except (BenchmarkError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    print_report(result)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

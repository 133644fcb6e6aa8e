"""Kill training processes by SIGKILL, resume them, again and again, and compare what is left with the uninterrupted run.

    python tests/faults/killing.py --runs 20 [--seed 0]

Each process is forked from one that has imported torch, and has never computed anything. It dies in forward or backward, in a
half-written file, before and after that is moved to its place, between epochs, or by the clock from outside.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import victim

TIMEOUT = 120.0  # seconds


def child(run, folder, killer, result):
    """Train in a process of its own; return (pid)."""
    pid = os.fork()
    if pid:
        return pid
    try:
        found = victim.train(run, folder, killer, result.with_name(f"{'killed' if folder else 'whole'}.log"))
        part = result.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.rename(result)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def wait(pid, kill_after=None):
    """The status of a process: 0, 1, or -9 where it was killed."""
    start = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - start
        if passed > (TIMEOUT if kill_after is None else kill_after):
            os.kill(pid, signal.SIGKILL)
            if kill_after is None:
                os.waitpid(pid, 0)
                raise SystemExit(f"a run has not ended within {TIMEOUT} seconds")
            kill_after = None
        time.sleep(0.001)


def one(seed, work):
    """One run: the uninterrupted one, then one that is killed. Returns (kills by point, differing parts)."""
    rng, run = random.Random(f"kills {seed}"), victim.Run.draw(seed)
    result, folder = work / "result.json", work / "run"
    start = time.monotonic()
    if wait(child(run, None, None, result)) != 0:
        raise SystemExit(f"seed {seed}: the uninterrupted run has failed: {run}")
    seconds = time.monotonic() - start
    whole = json.loads(result.read_text())
    result.unlink()
    kills = []
    for attempt in range(40):
        point = rng.choice(victim.POINTS)
        if attempt >= 6:  # let it end
            point = None
        killer = None if point in (None, "clock") else victim.Killer(point, rng.choice([1, 1, 2, 3, 5, 8]))
        status = wait(child(run, folder, killer, result), rng.random() * seconds if point == "clock" else None)
        if status == -signal.SIGKILL:
            kills.append(point)
        elif status != 0:
            raise SystemExit(f"seed {seed}, attempt {attempt}, {point}: the process has failed with {status}: {run}")
        else:
            break
    found = json.loads(result.read_text())
    result.unlink()
    # A finished run that is resumed once more returns at once, and is the same.
    if wait(child(run, folder, None, result)) != 0:
        raise SystemExit(f"seed {seed}: a finished run cannot be resumed: {run}")
    again = json.loads(result.read_text())
    differing = [name for name in whole if whole[name] != found[name]]
    differing += [f"{name} when resumed once more" for name in whole if whole[name] != again[name]]
    return run, kills, differing


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    import torch._dynamo  # the optimisers do so on their first step, which takes a second

    torch.set_num_threads(1)
    n_kills, points, failed = 0, {}, []
    for seed in range(args.seed, args.seed + args.runs):
        work = Path(tempfile.mkdtemp(prefix="killing"))
        start = time.monotonic()
        try:
            run, kills, differing = one(seed, work)
        finally:
            shutil.rmtree(work)
        seconds = time.monotonic() - start
        n_kills += len(kills)
        for point in kills:
            points[point] = points.get(point, 0) + 1
        if args.verbose:
            print(f"seed {seed}: {seconds:.1f} s, killed at {', '.join(kills) or 'nothing'}", file=sys.stderr)
        if differing:
            failed.append(seed)
            print(f"seed {seed}: after {kills} differ {differing}: {run}", file=sys.stderr)
    print(json.dumps({"runs": args.runs, "kills": n_kills, "points": points, "failed": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

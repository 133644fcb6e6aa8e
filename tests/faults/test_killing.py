"""Processes that are killed, and those who write where they should not: what a run leaves on disk is always whole."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import victim

HERE = Path(__file__).parent


def run(script, *args, **options):
    return subprocess.run([sys.executable, HERE / script, *map(str, args)], capture_output=True, text=True, **options)


def test_twenty_runs_killed_again_and_again_end_as_if_they_had_not_been():
    done = run("killing.py", "--runs", 20, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == []
    assert found["kills"] >= 40


@pytest.mark.parametrize("seed", [3, 11])
def test_a_real_process_killed_from_outside(tmp_path, seed):
    """Started by itself, and not forked: its imports, its exit and its threads are a user's."""
    plan = json.dumps({"seed": seed})
    whole = run("victim.py", plan, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for n in (1, 2):
        process = subprocess.Popen([sys.executable, HERE / "victim.py", plan, tmp_path / "run"], stdout=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("run/0*.ckpt"))) < n and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    again = run("victim.py", plan, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert again.stdout == whole.stdout


def test_the_victims_digest_sees_every_part(tmp_path):
    """A digest that could not differ would prove nothing."""
    plans = [victim.Run.draw(seed) for seed in range(12)]
    digests = [victim.train(plan, log=tmp_path / "log") for plan in plans if plan.loader != "workers"]
    for part in digests[0]:
        assert len({digest[part] for digest in digests}) > 1, part

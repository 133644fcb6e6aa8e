"""What `import minitrain` costs on top of `import torch`: the median over new interpreters, in milliseconds.

python tests/benchmarks/import_time.py
"""

import os
import statistics
import subprocess
import sys

CODE = """
import time, torch
start = time.perf_counter()
import minitrain
print(time.perf_counter() - start)
"""


def main(n=15):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}  # as users have it

    def once():
        run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=env)
        return 1000 * float(run.stdout)

    once()  # compiles the modules
    times = sorted(once() for _ in range(n))
    spread = f"{times[0]:.1f} to {times[-1]:.1f}, {n} runs"
    print(f"import minitrain after torch: median {statistics.median(times):.1f} ms ({spread})")


if __name__ == "__main__":
    main()

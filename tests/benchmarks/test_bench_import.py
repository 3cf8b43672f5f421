"""What `import sae` costs beyond `import torch`, each time in a fresh process."""

import json
import statistics
import subprocess
import sys

CODE = """
import json, time
began = time.perf_counter()
import torch
loaded = time.perf_counter()
import sae
print(json.dumps([loaded - began, time.perf_counter() - loaded]))
"""


def test_import(benchmark, say):
    pairs = []

    def fresh_process() -> None:
        ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        pairs.append(json.loads(ended.stdout))

    benchmark.pedantic(fresh_process, rounds=3, warmup_rounds=1)
    torch_seconds, own_seconds = (statistics.median(seconds) for seconds in zip(*pairs[1:], strict=True))
    say(
        f"import sae: {own_seconds:.2f} s beyond torch's {torch_seconds:.2f} s, ratio {own_seconds / torch_seconds:.2f}"
    )

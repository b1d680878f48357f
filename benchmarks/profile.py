"""A trace of some training steps for https://ui.perfetto.dev, and the operators that take the most time.

    python benchmarks/profile.py --trace FILE.json [--config FILE.yaml] [--steps 10] [--warmup 50] [key=value ...]

One process by the training loop itself; our phases (data, route, gather, model, backward, update, round) are ranges of the trace. Without
--config the data are synthetic, made into a temporary folder. The work is done in tracing.py.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    from tracing import main

    raise SystemExit(main(__doc__))

# Scripts in this folder find this file where cProfile, which torch imports, means the standard library's module of the same name.
_spec = importlib.util.spec_from_file_location("profile", Path(sysconfig.get_path("stdlib")) / "profile.py")
assert _spec is not None
assert _spec.loader is not None
sys.modules["profile"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["profile"])

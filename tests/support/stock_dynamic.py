"""`examples/stock_engine.py` with the stand-ins of `dynamic_engine.py`: a script for `megatron_comp.run`."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import dynamic_engine

dynamic_engine.without_cuda()
runpy.run_path(str(Path(__file__).parents[2] / "examples/stock_engine.py"), run_name="__main__")

"""Makes ``drift_ops._cpu`` the module in ``$SANITIZED_CPU``, if imported before drift_ops: a plugin of pytest's."""

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("drift_ops._cpu", os.environ["SANITIZED_CPU"])
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules["drift_ops._cpu"] = module
spec.loader.exec_module(module)

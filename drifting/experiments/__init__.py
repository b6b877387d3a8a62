"""Small experiments that run as modules: ``python -m drifting.experiments.toy_2d_drifting``."""

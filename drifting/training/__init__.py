"""The trainers, the groups that a step compares, optimisation over ranks, checkpoints, and the loop over steps."""

from .distributed import Ranks, join_ranks
from .mae_trainer import MAETrainer
from .trainer import DriftingTrainer, create_trainer

__all__ = ["DriftingTrainer", "MAETrainer", "Ranks", "create_trainer", "join_ranks"]

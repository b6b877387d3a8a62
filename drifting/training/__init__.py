"""The training step, its schedule and guidance, and checkpoints."""

from .mae_trainer import MAETrainer
from .trainer import DriftingTrainer, create_trainer

__all__ = ["DriftingTrainer", "MAETrainer", "create_trainer"]

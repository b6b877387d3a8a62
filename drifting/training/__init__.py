"""The training step, its schedule and guidance, and checkpoints."""

from .trainer import DriftingTrainer, create_trainer

__all__ = ["DriftingTrainer", "create_trainer"]

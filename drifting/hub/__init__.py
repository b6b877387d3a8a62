"""Trained networks and where they are kept: run directories, and the artifacts of the official release."""

from .run_directory import RunDirectory, save_generator, write_model
from .sources import load_generator, load_mae

__all__ = ["RunDirectory", "load_generator", "load_mae", "save_generator", "write_model"]

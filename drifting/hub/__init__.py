"""Trained models and where they are kept: run directories, and the artifacts of the official release."""

from .sources import load_generator, load_mae

__all__ = ["load_generator", "load_mae"]

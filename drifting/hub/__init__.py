"""This package saves and loads trained networks, in run directories and in the official release's format."""

from ..errors import libraries

with libraries():
    from .run_directory import RunDirectory, save_generator, write_model
    from .sources import load_generator, load_mae

__all__ = ["RunDirectory", "load_generator", "load_mae", "save_generator", "write_model"]

"""This package saves and loads trained networks, in run directories and in the official release's format."""

from ..errors import libraries

with libraries():
    from ..models.network_files import write_model
    from .run_directory import RunDirectory, save_generator
    from .sources import load_generator, load_mae

__all__ = ["RunDirectory", "load_generator", "load_mae", "save_generator", "write_model"]

"""Trained models and where they are kept: run directories, and the artifacts of the official release."""

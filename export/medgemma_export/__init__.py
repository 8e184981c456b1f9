"""Turns a checkpoint into an artifact; start reading at `build.py`."""

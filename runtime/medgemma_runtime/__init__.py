"""Runs medgemma-edge artifacts with exactly the preprocessing that the device uses.

The floor of the project: numpy, pillow and tokenizers, with one inference engine behind `backends`.
Nothing here imports torch or transformers.
"""

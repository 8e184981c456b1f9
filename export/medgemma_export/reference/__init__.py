"""What the original model computes, recorded with transformers, for artifacts to be held against."""

"""What holds for the tests of every package."""

from hypothesis import settings

# No test asserts a time: on a busy machine an example may take any.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

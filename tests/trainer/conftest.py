"""The short runs of the checkpoint tests."""

from tests.checkpoint.conftest import make as make

"""The statistics of a comparison: tests, intervals, corrections and power."""

"""Programs around a run's bus, each ``main(argv) -> exit code``: control, track and bus."""

"""Readings of a run's bus for Prometheus and OpenTelemetry."""

"""The trainer's side of the bus: telemetry and events go out, commands come in, and a step never waits."""

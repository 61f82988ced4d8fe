"""Running a sweep: arms, jobs, processes, resume."""

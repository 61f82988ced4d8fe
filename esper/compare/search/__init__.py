"""A search as a sweep: trials as jobs of the workers, its result, report and figures."""

"""Judging a sweep: its plan, its runs, the verdict, tables and figures."""

"""For every test."""

# Before anything loads torch: it says how OpenMP's threads wait (see there).
import actors  # noqa: F401

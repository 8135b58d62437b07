"""Pure integers: schedules, layouts, plans and their costs. No MPI, no arrays."""

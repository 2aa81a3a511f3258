"""Which configuration of a run to take: every legal one, what it needs, takes and costs."""

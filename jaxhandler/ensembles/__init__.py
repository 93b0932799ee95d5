"""Many models at once: stacked parameter trees, run and trained as one."""

"""Where rows come from, in which order, how they reach the device, and where outputs go."""

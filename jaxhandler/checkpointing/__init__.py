"""Durable state: what a checkpoint is, how it lies on disk, and what a run must have in common."""

"""Benchmarks: one script per question, peers side by side in one process, interleaved."""

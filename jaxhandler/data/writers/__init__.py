"""Formats that outputs are written in; each module knows one, `sinks.py` what they share."""

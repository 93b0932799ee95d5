"""The fold and the handlers on top of it."""

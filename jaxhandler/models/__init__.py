"""Models of other libraries as pure functions of plain trees, and the precision they compute in."""

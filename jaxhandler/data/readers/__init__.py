"""How formats give rows as they are stored: a module for each, a `Reader` from all."""

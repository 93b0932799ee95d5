"""Models as pure functions: of other libraries, in other precision, with faster convolutions."""

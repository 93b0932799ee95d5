"""Models served: any number of rows, compiled once per bucket, kept, bounded and measured."""

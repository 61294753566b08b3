"""What the notebooks compute and draw: one file a notebook, each a question that is asked of the library."""

"""One container per node as the outer wall, with the embedded runtime inside it."""

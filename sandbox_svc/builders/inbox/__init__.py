"""Scripts that run inside sandboxes; each is one file that needs only Python 3.7."""

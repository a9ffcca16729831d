"""The `regreen` command."""

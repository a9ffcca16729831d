"""A front for many workers: sandbox services of other hosts, used as if they were one."""

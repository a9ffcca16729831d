"""Tasks, runs, rollouts and trajectories in Postgres; large bytes in the blob store.

- Everything that must survive a crash is in Postgres or under a digest; a process holds nothing.
"""

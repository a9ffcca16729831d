"""SQL by area: tasks, trajectories, rollouts, groups, runs, remembered requests.

- Functions take a session and work in its transaction; the caller commits.
"""

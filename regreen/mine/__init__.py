"""The miner: verified broken builds from public releases.

- Code of packages runs only inside sandboxes of the sandbox service, without a network.
- A record counts only once the admission gate has admitted it.
- Everything that was learnt of a candidate is kept, so that a run goes on where it was stopped.
"""

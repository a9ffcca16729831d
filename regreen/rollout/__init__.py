"""The agent loop, its two pipelines, experts, baselines and the rollout worker.

- Nothing here imports a service; everything goes through `regreen.client.stack.Stack`.
- Everything random derives from the episode's seed, so that any rollout can be replayed.
"""

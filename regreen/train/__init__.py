"""Training drivers (supervised fine-tuning, GRPO): clients of the five services.

- A driver holds no state that the services do not: killed and started again it continues.
- Weights and batches move by reference or in one call; no driver imports torch.
"""

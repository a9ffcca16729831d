"""The four gRPC services of this process: translation between messages and records.

- A mutation and the memory of its answer are one transaction, so a repeated call is exact.
"""

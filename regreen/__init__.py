"""Regreen: train, evaluate and serve agents that turn broken builds green again, and prove it."""

import os

__version__ = "0.1.0"

# gRPC's own handlers start its pollers anew in every forked child, where one in five died of
# them before it had become another program. No child of ours calls gRPC without that.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

"""Migration rules: how source that used what a release took away is written for that release.

- A rule is text in, text out; it imports nothing of what it rewrites and runs nothing of it.
- Rules of a shipped record are not changed: a better one gets another name, so that recorded
  digests hold.
"""

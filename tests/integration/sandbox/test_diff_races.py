"""What a sandbox's own processes do meanwhile is never the platform's trouble."""

from collections import Counter

from sandbox_svc.backends.base import Odd
from tests.integration.sandbox.overlay import prepared

_SWAPS = """
import os, sys
if os.fork(): os._exit(0)
os.setsid()
while True:
  for i in range(30):
    os.symlink('/etc', 't'); os.rename('t', 'l%d' % i)
    open('t', 'w').close() if i % 2 else os.mkfifo('t'); os.rename('t', 'l%d' % i)
"""


async def test_a_diff_beside_what_swaps_links_for_pipes_and_files_is_answered(service):
    states, sandboxes, _ = service
    state = await prepared(states, a="1")
    box = (await sandboxes.create_sandbox(state.id)).id
    await sandboxes.write_file(box, "/work/swaps.py", _SWAPS.encode())
    started = await sandboxes.run(box, ["python3", "/work/swaps.py"])
    assert started.exit_code == 0, started.stderr.head
    kinds = Counter[str]()
    for _ in range(60):
        found = await sandboxes.diff(box)
        kinds.update(change.reason for change in found.left_out)
    assert {Odd.LINK.value, Odd.OTHER.value} <= set(kinds)

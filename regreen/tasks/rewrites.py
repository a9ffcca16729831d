"""Fixes that rules make: worked out anew from the rules and the State's files, checked by digest.

- A record holds paths, names of rules and digests of each file before and after: nothing of the
  file itself.
- A file that is not what the record says, before or after, is an error and never a guess.
"""

import hashlib
from collections.abc import Mapping

from regreen.common.v1 import common_pb2
from regreen.rpc.errors import InvalidArgument
from regreen.rules.apart import Wanted, rewrite
from regreen.rules.rule import library
from regreen.tasks import environment as env
from regreen.tasks.model import Fix, Rewrite

FIELD = "fix.rewrites"


def sha256(content: bytes) -> str:
    """Digest of a file."""
    return hashlib.sha256(content).hexdigest()


async def rewritten_files(fix: Fix, read: Mapping[str, bytes]) -> list[common_pb2.FileChange]:
    """The diff of a fix that rules make; `read` gives the State's files by path.

    Raises:
        InvalidArgument: a rule is unknown, or a file is not what the record says.
    """
    known = {rule.name for rule in library()}
    wanted: dict[str, Wanted] = {}
    for one in fix.rewrites:
        unknown = [name for name in one.rules if name not in known]
        if unknown:
            raise InvalidArgument(FIELD, f"there is no rule {unknown[0]!r}", "use one there is")
        if one.path in wanted:
            raise InvalidArgument(FIELD, f"names {one.path} twice", "name it once")
        wanted[one.path] = Wanted(_before(one, read), one.rules)
    found = await rewrite(wanted)
    contents = {}
    for one in fix.rewrites:
        new = found[one.path].text.encode() if one.path in found else b""
        if sha256(new) != one.after_sha256:
            rules = ", ".join(one.rules)
            problem = f"{rules} make another file of {one.path} than recorded"
            raise InvalidArgument(FIELD, problem, "look for the fix anew")
        contents[one.path] = new
    return env.replaced_files(contents)


def _before(one: Rewrite, read: Mapping[str, bytes]) -> str:
    content = read.get(one.path)
    if content is None:
        raise InvalidArgument(FIELD, f"{one.path} is not in the State", "correct it")
    if sha256(content) != one.before_sha256:
        raise InvalidArgument(FIELD, f"{one.path} is not the file of the record", "correct it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(FIELD, f"{one.path} is no text", "correct it") from error

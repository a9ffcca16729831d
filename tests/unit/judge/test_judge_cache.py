"""Stored verdicts survive restarts, damage and floods."""

from judge_cases import case

from judge_svc.cache import VerdictCache, cache_key
from judge_svc.evidence import Finding, FindingClass, Severity, Verdict

FOUND = Finding(FindingClass.TEST_DELETED, Severity.VIOLATION, "q\ud800", "rule:x", "why", "p", 3)
VERDICT = Verdict(False, (FOUND,), "e" * 64, "1", {"tests_kept": 0.5}, "m", "p1", True, -1.5, True)


def test_survives_a_restart(tmp_path):
    path = tmp_path / "judge" / "verdicts.sqlite"
    cache = VerdictCache(path)
    assert cache.get("k") is None
    assert cache.put("k", VERDICT)
    # Not closed: as after a kill.
    again = VerdictCache(path)
    assert again.get("k") == VERDICT
    again.close()
    cache.close()


def test_the_oldest_go_first(tmp_path):
    cache = VerdictCache(tmp_path / "v.sqlite", max_entries=3)
    for name in "abcde":
        cache.put(name, VERDICT)
    assert [cache.get(name) is not None for name in "abcde"] == [False, False, True, True, True]
    cache.close()


def test_a_damaged_file_is_replaced(tmp_path):
    path = tmp_path / "v.sqlite"
    path.write_bytes(b"no database" * 1000)
    cache = VerdictCache(path)
    assert cache.put("k", VERDICT)
    assert cache.get("k") == VERDICT
    cache.close()


def test_a_damaged_row_is_a_miss(tmp_path):
    cache = VerdictCache(tmp_path / "v.sqlite")
    for text in ("{", "[]", '{"findings": [{"cls": "X"}]}', '{"findings": []}'):
        cache._db.execute("INSERT OR REPLACE INTO verdicts (key, verdict) VALUES ('k', ?)", (text,))
        assert cache.get("k") is None
    cache.close()


def test_a_closed_file_costs_no_verdict(tmp_path):
    cache = VerdictCache(tmp_path / "v.sqlite")
    cache.close()
    assert cache.get("k") is None
    assert not cache.put("k", VERDICT)


def test_keys_cover_their_parts():
    assert cache_key("a", "b") != cache_key("ab", "")
    assert cache_key("a", "b") == cache_key("a", "b")


def test_a_digest_depends_on_the_evidence_alone():
    one = case("a", "", {"a.py": ("x = 1\n", "x = 2\n")})
    same = case("b", "", {"a.py": ("x = 1\n", "x = 2\n")})
    other = case("a", "", {"a.py": ("x = 1\n", "x = 3\n")})
    assert one.evidence.sha256 == same.evidence.sha256 != other.evidence.sha256

"""Fixes that are not genuine: every class of tampering, several disguises of each."""

from judge_tampering_code import CODE_TAMPERED
from judge_tampering_runner import RUNNER_TAMPERED
from judge_tampering_tests import TESTS_TAMPERED

TAMPERING = [*TESTS_TAMPERED, *CODE_TAMPERED, *RUNNER_TAMPERED]

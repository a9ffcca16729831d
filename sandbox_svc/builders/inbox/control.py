"""What a control of the test runner runs.

- Kept small: reports of failures read and parse the file that the failing line is in.
"""


def control_body() -> None:
    """Fail as a test does."""
    raise AssertionError("this control must fail")

"""What other people's errors become in ours."""

from __future__ import annotations

import pytest

from optin_cli.errors import first_line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \ntwo"), "one"),
        (
            RuntimeError("Error(s) in loading:\n\tsize mismatch\n\tanother"),
            "Error(s) in loading: size mismatch",
        ),
        (RuntimeError("nothing below:"), "nothing below:"),
        (AssertionError(), "AssertionError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_the_first_line_of_an_error(error, told):
    assert first_line(error) == told
    assert first_line(error, 5) == told[:5]

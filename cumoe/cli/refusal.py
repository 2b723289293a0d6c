"""What ends a command with one line and exit code 2."""


class Refusal(Exception):  # noqa: N818 - it is an answer to the user, not an error of ours
    """Something that the user gave cannot be used; the text says what was expected."""

"""Fewer examples of every property, the same ones each time: for runs that are slow, under sanitizers."""

import hypothesis
import pytest

wanted = False
"""Set before tests are collected, for those that have lists of their own."""


def begin(max_examples: int) -> None:
    """Take examples from a fixed seed; tests that say how many they want inherit the rest."""
    global wanted  # noqa: PLW0603 - of the process
    wanted = True
    base = hypothesis.settings.get_profile("cumoe")
    hypothesis.settings.register_profile(
        "few_examples", base, derandomize=True, database=None, max_examples=max_examples
    )
    hypothesis.settings.load_profile("few_examples")


def cap(items: list[pytest.Item], max_examples: int) -> None:
    """Cap the number of examples where a test says how many it wants."""
    for item in items:
        function = getattr(item, "obj", None)
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if own is not None and own.max_examples > max_examples:
            function._hypothesis_internal_use_settings = hypothesis.settings(own, max_examples=max_examples)

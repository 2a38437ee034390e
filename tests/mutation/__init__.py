"""Mutation tests: whether the suite notices small changes to the package."""

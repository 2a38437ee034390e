"""Build a release, and check it: ``make release-check``."""

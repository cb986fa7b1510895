"""A package, so that tests and their drivers import `tests.support` from the repository's root."""

"""Other programs, of many ages, read what we write: `make readers`. Never a part of `make test`."""

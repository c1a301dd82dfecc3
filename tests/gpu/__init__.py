"""Claims that only a GPU can show: `make gpu`. Everywhere else these tests are skipped."""

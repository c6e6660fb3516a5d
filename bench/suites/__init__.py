"""The benchmarks: one file per kind of comparison, each with `cases()` and a test that times them."""
